"""A rank is killed in the middle of backward(): the others get an error that names it, and leave normally.

PYCOMM_KILL_RUNS=20 runs more of them; `-s` shows how long it took.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = int(os.environ.get("PYCOMM_KILL_RUNS", "2"))
LIMIT = 10  # seconds; tens of milliseconds are usual


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "reducer"])
def test_survivors_are_told_and_leave(way: str) -> None:
    program = Path(__file__).parent / "kill_program.py"
    done = subprocess.run(
        [sys.executable, str(program), way, str(RUNS)], capture_output=True, text=True, timeout=60 + 30 * RUNS
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2 * RUNS
    for row in rows:
        assert "PeerLostError: rank 1 " in row["error"], row
        assert row["exit"] == 0, (row, done.stderr)
    told, left = (max(row[key] for row in rows) for key in ("told", "left"))
    print(f"{way}: all of {len(rows)} survivors told after {1e3 * told:.0f} ms, gone after {left:.1f} s")
    assert told < LIMIT
