"""`pycomm bench codecs`: measures the errors of gradient codecs and the bytes that they send."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from pycomm.cli import output
from pycomm.cli.main import fail
from pycomm.cli.values import at_least, at_most

ALGORITHMS = ("two_shot", "ring")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", default="2,8", metavar="NUMBERS", help="world sizes (2,8)")
    parser.add_argument(
        "--algorithms", default="two_shot,ring", metavar="NAMES", help="routes (two_shot,ring)"
    )
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="calls that are summed up (300)")
    parser.add_argument("--count", type=int, default=8192, metavar="N", help="Gaussian elements (8192)")
    parser.add_argument(
        "--gradients",
        metavar="PATH",
        help="an .npz of examples/record_gradients.py, in addition to the Gaussian vectors",
    )
    output.add_options(parser)


def run(args: argparse.Namespace) -> int:
    try:
        output.check(args, "pycomm bench codecs")
    except ValueError as error:
        return fail(str(error))
    from rich.progress import Progress

    from pycomm.bench import codecs as c
    from pycomm.bench.machine import describe as machine

    try:
        about = machine()
        at_least(1, "--steps", args.steps)
        at_least(1, "--count", args.count)
        if not all(size.isdecimal() and int(size) for size in args.ranks.split(",")):
            raise ValueError(f"--ranks {args.ranks}: numbers of ranks, as in 2,8")
        ranks = [int(size) for size in args.ranks.split(",")]
        at_most(64, "--ranks", max(ranks))
        algorithms = args.algorithms.split(",")
        for name in algorithms:
            if name not in ALGORITHMS:
                raise ValueError(f"--algorithms {name}: this command compares {' and '.join(ALGORITHMS)}")
        data = [c.gaussian(args.count, args.steps, max(ranks))]
        if args.gradients:
            data.append(c.recorded(args.gradients, args.steps))
            most = {"ranks": (max(ranks), data[-1].ranks), "steps": (args.steps, data[-1].steps)}
            for option, (wanted, has) in most.items():
                if wanted > has:
                    raise ValueError(
                        f"--{option} {wanted}: {args.gradients} has {has}; ask for fewer, or record more"
                    )
    except ValueError as error:
        return fail(str(error))
    except MemoryError:
        return fail(
            f"--count {args.count}: so many elements, for every step and rank, do not fit into memory"
        )

    console, errors = output.consoles(args, 160)
    console.print(about, highlight=False)
    rows: list[c.Row] = []
    with Progress(console=errors, transient=True, auto_refresh=False) as progress:
        total = len(data) * sum(1 for _ in c.cases(ranks, algorithms))
        task = progress.add_task("measuring", total=total)
        for of in data:
            for row in c.measure(of, ranks, algorithms):
                rows.append(row)
                words = f"{row.data}, {row.ranks} ranks: {row.codec}"
                progress.update(task, description=words, advance=1, refresh=True)
    console.print(c.table(rows, args.steps))
    outputs: dict[str, Callable[[str], None]] = {
        "json": lambda path: output.write_text(path, c.as_json(rows, about, args.steps)),
        "plot": lambda path: c.plot(rows, path, about),
    }
    return output.not_written([*output.write(args, outputs), *output.lost(console)])
