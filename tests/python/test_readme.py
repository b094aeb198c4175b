"""The README's script is examples/hello.py, which runs; what the README and the docs link to is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELLO = ROOT / "examples" / "hello.py"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_script_of_the_readme_is_hello() -> None:
    script = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert script and script[1] == HELLO.read_text()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_hello_runs(ranks: int) -> None:
    command = [sys.executable, "-m", "pycomm", "run", "-n", str(ranks), str(HELLO)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    total = f"x = [{ranks * (ranks + 1) // 2}. "
    said = sorted(done.stdout.splitlines())
    assert len(said) == ranks
    for rank, line in enumerate(said):
        assert line.startswith(f"[{rank}] rank {rank} of {ranks}: {total}"), line
        assert line.endswith(f"my group = {list(range(rank % 2, ranks, 2))}".replace(",", "")), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        there = page.parent / target if target else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, anchor
