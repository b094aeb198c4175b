"""`pycomm verify`: proves plans, and says in words what is wrong with an incorrect one."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pycomm
from pycomm import _native
from pycomm.bench.workers.load import is_own
from pycomm.cli import output
from pycomm.cli.bench_options import own_algorithm
from pycomm.cli.main import fail
from pycomm.cli.values import check_ranks, needs, numbers

# send_recv is proved with its pairs of ranks by the tests.
COLLECTIVES = tuple(name for name in _native.COLLECTIVES if name != "send_recv")


@dataclass(frozen=True)
class Case:
    collective: str
    algorithm: str
    size: int
    count: int
    root: int
    placement: str
    in_place: bool
    dtype: str
    op: str

    def counterexample(self) -> str | None:
        own = self.algorithm if isinstance(self.algorithm, pycomm.Algorithm) else None
        return _native.verify(
            self.algorithm,
            self.collective,
            self.size,
            self.count,
            root=self.root,
            placement=self.placement,
            in_place=self.in_place,
            dtype=self.dtype,
            op=self.op,
            write=own.write if own is not None else None,
        )

    def __str__(self) -> str:
        root = f" from root {self.root}" if self.root else ""
        return (
            f"{self.algorithm} {self.collective} of {self.count} {self.dtype} ({self.op}) on {self.size}"
            f" ranks{root}, {self.placement} buffers{', in place' if self.in_place else ''}"
        )


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--algorithm", default="all", help="names, or your own as module:name, separated by commas (all)"
    )
    parser.add_argument("--collective", default="all", help="names, separated by commas (all)")
    parser.add_argument(
        "--ranks", default="1-17,24,32,64", help="world sizes: numbers and ranges (1-17,24,32,64)"
    )
    parser.add_argument("--counts", default="0,1,7,1001,300007", help="elements (0,1,7,1001,300007)")
    parser.add_argument("--dtype", default="float32", help="element type (float32)")
    parser.add_argument("--op", default="sum", help="operator of the reductions (sum)")


def run(args: argparse.Namespace) -> int:
    try:
        collectives = COLLECTIVES if args.collective == "all" else args.collective.split(",")
        algorithms = {name: _algorithms(name, args.algorithm) for name in collectives}
        sizes, counts = numbers(args.ranks), numbers(args.counts)
        for size in (min(sizes), max(sizes)):
            check_ranks("--ranks", size)
        for name in args.algorithm.split(","):
            if name != "all" and not any(_algorithms(collective, name) for collective in collectives):
                raise ValueError(
                    f"--algorithm {name} --collective {args.collective}: no algorithm has this name"
                )
    except ValueError as error:
        return fail(str(error))
    try:
        from rich.progress import Progress
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return fail(needs("pycomm verify", "rich"))

    table = Table("collective", "algorithm", "ranks", "plans", "seconds", "result")
    failure: tuple[Case, str] | None = None
    pairs = [(collective, name) for collective, names in algorithms.items() for name in names]
    console = output.console(sys.stdout)
    with Progress(console=console, transient=True) as progress:
        for collective, algorithm in progress.track(pairs, description="proving"):
            start, proved, found = time.perf_counter(), 0, None
            for case in _cases(collective, algorithm, sizes, counts, args.dtype, args.op):
                try:
                    found = case.counterexample()
                except (TypeError, ValueError) as error:
                    return fail(f"{case}: {error}")
                if found:
                    failure = failure or (case, found)
                    break
                proved += 1
            seconds = f"{time.perf_counter() - start:.2f}"
            proof = Text("proved", "green")
            result = Text.assemble(("wrong", "red"), f" on {case.size} ranks") if found else proof
            table.add_row(collective, str(algorithm), args.ranks, str(proved), seconds, result)
    console.print(table)
    if failure:
        case, found = failure
        console.print(f"{case}:\n  {found}", highlight=False, soft_wrap=True)
        return 1
    return output.not_written(output.lost(console))


def _algorithms(collective: str, wanted: str) -> list[str]:
    known = _native.algorithms(collective)
    if wanted == "all":
        return known
    own = [own_algorithm(name) for name in wanted.split(",") if is_own(name)]
    return [name for name in known if name in wanted.split(",")] + [
        algorithm for algorithm in own if algorithm.collective == collective
    ]


def _cases(
    collective: str, algorithm: str, sizes: list[int], counts: list[int], dtype: str, op: str
) -> Iterator[Case]:
    """The first root, one in the middle and the last stand for all roots."""
    for size in sizes:
        roots = sorted({0, size // 2, size - 1}) if collective in _native.ROOTED else [0]
        for count in counts if collective != "barrier" else [0]:
            for root in roots:
                for placement, in_place in itertools.product(("plain", "symmetric"), (False, True)):
                    yield Case(collective, algorithm, size, count, root, placement, in_place, dtype, op)
