"""`pycomm bench codecs`: measures what gradient codecs lose, and what they send."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from pycomm.cli.main import fail
from pycomm.cli.values import at_least, needs

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
        help="an .npz of examples/record_gradients.py, beside the Gaussian vectors",
    )
    parser.add_argument("--json", metavar="PATH", help="- is standard output, which then holds nothing else")
    parser.add_argument("--plot", metavar="PATH", help="a PNG")


def run(args: argparse.Namespace) -> int:
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return fail(needs("pycomm bench codecs", "rich"))
    if args.plot and not importlib.util.find_spec("matplotlib"):
        return fail(needs("pycomm bench codecs --plot", "matplotlib"))
    from pycomm.bench import codecs as c
    from pycomm.bench.report import machine

    try:
        at_least(1, "--steps", args.steps)
        at_least(1, "--count", args.count)
        if not all(size.isdecimal() and int(size) for size in args.ranks.split(",")):
            raise ValueError(f"--ranks {args.ranks}: numbers of ranks, as in 2,8")
        ranks = [int(size) for size in args.ranks.split(",")]
        algorithms = args.algorithms.split(",")
        for name in algorithms:
            if name not in ALGORITHMS:
                raise ValueError(f"--algorithms {name}: {', '.join(ALGORITHMS)} carry codecs")
        data = [c.gaussian(args.count, args.steps, max(ranks))]
        if args.gradients:
            data.append(c.recorded(args.gradients, args.steps))
            if max(ranks) > data[-1].ranks:
                raise ValueError(f"--ranks {args.ranks}: {args.gradients} was recorded on {data[-1].ranks}")
        for option, path in (("--json", args.json), ("--plot", args.plot)):
            if path and not Path(path).parent.is_dir():
                raise ValueError(f"{option} {path}: there is no directory {Path(path).parent}")
    except ValueError as error:
        return fail(str(error))

    errors = Console(stderr=True)
    to_terminal = errors.is_terminal if args.json == "-" else sys.stdout.isatty()
    console = Console(stderr=args.json == "-", width=None if to_terminal else 160)
    console.print(machine(), highlight=False)
    rows: list[c.Row] = []
    with Progress(console=errors, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("measuring", total=None)
        for of in data:
            for row in c.measure(of, ranks, algorithms):
                rows.append(row)
                progress.update(task, description=f"{row.data}, {row.ranks} ranks: {row.codec}", refresh=True)
    console.print(c.table(rows, args.steps))
    text = c.as_json(rows, machine(), args.steps)
    if args.json == "-":
        print(text)
    elif args.json:
        Path(args.json).write_text(text + "\n")
    if args.plot:
        c.plot(rows, args.plot, machine())
    return 0
