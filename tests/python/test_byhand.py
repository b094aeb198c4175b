"""Jobs whose RANK, WORLD_SIZE and MASTER_* somebody set by hand."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pycomm.byhand import this_start

SAY = """
import os, sys
import numpy as np
import pycomm
comm = pycomm.init(timeout=float(sys.argv[1]))
names = comm.all_gather(np.array([ord(os.environ.get("NAME", "-"))]))
print(os.environ.get("NAME", "-"), "sees", "".join(map(chr, names)))
"""
PLACE = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29533"}


class Jobs:
    def __init__(self) -> None:
        self.ranks: list[subprocess.Popen[str]] = []

    def start(self, rank: int, *, through: tuple[str, ...] = (), timeout: float = 30, **more: str) -> None:
        command = [*through, sys.executable, "-c", SAY, str(timeout), f"--local_rank={rank}"]
        env = {**os.environ, **PLACE, "RANK": str(rank), **more}
        self.ranks.append(
            subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )

    def ends(self) -> list[tuple[int, str, str]]:
        return [(rank.wait(), *rank.communicate(timeout=60)) for rank in self.ranks]


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    found = Jobs()
    yield found
    for rank in found.ranks:
        rank.kill()


# A shell of its own, as a terminal is.
SHELL = ("env", "-u", "RANK", "sh", "-c", 'rank=$0; shift 0; RANK=$rank "$@"; exit $?')


def shell(rank: int) -> tuple[str, ...]:
    return (*SHELL, str(rank))


def test_two_jobs_of_one_process(jobs: Jobs) -> None:
    for name, rank in (("A", 0), ("B", 1), ("A", 1), ("B", 0)):
        jobs.start(rank, NAME=name)
    for name, (code, out, err) in zip("ABAB", jobs.ends(), strict=True):
        assert (code, out) == (0, f"{name} sees {2 * name}\n"), err


def test_what_tells_ranks_apart_does_not_tell_jobs_apart(jobs: Jobs) -> None:
    for rank in (0, 1):
        own = {"CUDA_VISIBLE_DEVICES": f"{4 + rank}", "CARD": str(rank)}
        jobs.start(rank, through=("sh", "-c", '"$@"; exit $?', "sh"), SHLVL=str(rank + 3), **own)
    for code, out, err in jobs.ends():
        assert (code, out) == (0, "- sees --\n"), err


def test_ranks_of_two_shells_wait_and_say_so(jobs: Jobs) -> None:
    for rank in (0, 1):
        jobs.start(rank, through=shell(rank), timeout=5)
    for rank, (code, _, err) in enumerate(jobs.ends()):
        assert code == 1
        warning, *_ = err.splitlines()
        assert warning.startswith(f"pycomm: rank {rank} (pid ") and "waits for the other ranks" in warning
        assert f"RANK={1 - rank} and the same MASTER_PORT" in warning and "started it" in warning
        assert warning.endswith("start all ranks with the same PYCOMM_JOB=<any word>, or with `pycomm run`")
        assert "CommTimeoutError" in err and err.count("PYCOMM_JOB") >= 1


def test_one_word_makes_them_one_job(jobs: Jobs) -> None:
    for rank in (0, 1):
        jobs.start(rank, through=shell(rank), PYCOMM_JOB="mine", NAME="xy"[rank])
    assert sorted(end[1] for end in jobs.ends()) == ["x sees xy\n", "y sees xy\n"]


def test_what_the_program_sets_itself_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = this_start(2).name()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert this_start(2).name() == before
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--lr=0.2"])
    assert this_start(2).name() != before
