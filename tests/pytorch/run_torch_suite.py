"""torch's own tests of a distributed backend on pycomm, beside Gloo: python tests/pytorch/run_torch_suite.py

Takes some seven minutes on two cores. Needs torch, rich, and expecttest, which torch's tests import. Fails
if a test ends worse on pycomm than on Gloo and no row of a table in docs/torch-distributed.md says why, and
if such a row holds no more. What each test prints is kept in a file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch_suite
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch_suite import Outcome

PAGE = Path(__file__).parents[2] / "docs" / "torch-distributed.md"
BACKENDS = ("gloo", "pycomm")
STATUSES = ("passed", "skipped", "failed")  # from good to bad
Outcomes = dict[str, Outcome]  # by the test's name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world-size", type=int, nargs="+", default=[2, 3], metavar="N", help="default: 2 3")
    parser.add_argument("-k", default="", metavar="WORDS", help="only tests whose name contains this")
    parser.add_argument("--timeout", type=int, default=120, help="seconds for each test (%(default)s)")
    parser.add_argument(
        "--logs", type=Path, metavar="FOLDER", help="where files go; default: a temporary folder"
    )
    args = parser.parse_args(argv)
    logs = args.logs or Path(tempfile.mkdtemp(prefix="torch-suite-"))
    reasons = known_differences(PAGE.read_text(), version("torch"))
    console = Console(width=None if sys.stdout.isatty() else 140)
    complaints = []
    for size in args.world_size:
        found: dict[str, Outcomes] = {}
        seconds = {}
        for backend in BACKENDS:
            start = time.monotonic()
            found[backend] = run_all(backend, size, args.k, args.timeout, logs / f"{backend}-{size}", console)
            seconds[backend] = time.monotonic() - start
        console.print(counts(size, found, seconds), skips(size, found), differences(size, found, reasons))
        complaints += [
            f"{size} ranks: {line}" for line in complaints_of(found["gloo"], found["pycomm"], reasons)
        ]
    for line in complaints:
        console.print(line, style="red", markup=False, highlight=False)
    console.print(f"what the tests printed: {logs}")
    return 1 if complaints else 0


def known_differences(page: str, torch: str) -> dict[str, str]:
    """Why tests are worse on pycomm: the rows `| test_... | from torch | why |` of a page, for a release."""
    rows = re.findall(r"^\| *(test_\w+) *\| *([\d.]+) *\| *(.+?) *\|$", page, re.MULTILINE)
    return {test: why for test, since, why in rows if number(since) <= number(torch)}


def number(release: str) -> tuple[int, ...]:
    """Of a release such as 2.13.0+cpu: (2, 13)."""
    return tuple(map(int, release.split(".")[:2]))


def complaints_of(gloo: Outcomes, ours: Outcomes, reasons: dict[str, str]) -> list[str]:
    """What is worse on pycomm and in no row of the table, and rows of tests that are not worse."""
    lines = []
    for test, theirs in gloo.items():
        mine = ours[test]
        worse = STATUSES.index(mine.status) > STATUSES.index(theirs.status)
        what = f"{test} {theirs.status} on Gloo and {mine.status} on pycomm"
        if worse and test not in reasons:
            lines.append(f"{what}: {last_line(mine)}")
        if test in reasons and not worse:
            lines.append(f"{what}: take its row from {PAGE}")
    if not gloo:
        lines.append("no test has such a name")
    return lines


def run_all(backend: str, size: int, words: str, timeout: int, logs: Path, console: Console) -> Outcomes:
    """Runs the tests in a process of their own, which alone has the environment that they read."""
    logs.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=serve, args=(backend, size, words, timeout, logs, theirs))
    process.start()
    theirs.close()
    outcomes = {}
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(f"{backend}, {size} ranks", total=None)
            for outcome in received(ours):
                if isinstance(outcome, int):
                    progress.update(task, total=outcome)
                    continue
                outcomes[outcome.test] = outcome
                progress.advance(task)
    finally:
        ours.close()  # a process without a reader ends with the test that it runs
        process.join()
    if process.exitcode:
        raise SystemExit(
            f"the tests of {backend} on {size} ranks could not be run: exit code {process.exitcode}"
        )
    return outcomes


def serve(backend: str, size: int, words: str, timeout: int, logs: Path, pipe: Any) -> None:
    suite = torch_suite.load(backend, size, timeout)
    tests = [name for name in torch_suite.names(suite) if words in name]
    pipe.send(len(tests))
    for test in tests:
        pipe.send(torch_suite.run(suite, test, timeout + 30, str(logs / f"{test}.log")))


def received(pipe: Any) -> Iterator[Any]:
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


def counts(size: int, found: dict[str, Outcomes], seconds: dict[str, float]) -> Table:
    table = Table("backend", *STATUSES, "seconds", title=f"{size} ranks", title_justify="left")
    for backend, outcomes in found.items():
        number = Counter(outcome.status for outcome in outcomes.values())
        table.add_row(backend, *(str(number[s]) for s in STATUSES), f"{seconds[backend]:.0f}")
    return table


def skips(size: int, found: dict[str, Outcomes]) -> Table:
    table = Table("skipped, because", *BACKENDS, title=f"{size} ranks, skipped", title_justify="left")
    number = {
        backend: Counter(
            last_line(outcome).replace(backend, "BACKEND")
            for outcome in found[backend].values()
            if outcome.status == "skipped"
        )
        for backend in BACKENDS
    }
    for reason, _ in sum(number.values(), Counter()).most_common():
        table.add_row(reason, *(str(number[backend][reason]) for backend in BACKENDS))
    return table


def differences(size: int, found: dict[str, Outcomes], reasons: dict[str, str]) -> Table:
    table = Table("test", *BACKENDS, "why", title=f"{size} ranks, where they differ", title_justify="left")
    for test, theirs in found["gloo"].items():
        ours = found["pycomm"][test]
        if ours.status != theirs.status:
            table.add_row(test, theirs.status, ours.status, reasons.get(test, last_line(ours)))
    return table


def last_line(outcome: Outcome) -> str:
    return (outcome.reason.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    sys.exit(main())
