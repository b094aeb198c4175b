"""`pycomm bench p2p`: latency and bandwidth between two ranks, and between all pairs of cores."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from dataclasses import replace

from pycomm.cli import bench_options as options
from pycomm.cli import output
from pycomm.cli.main import fail
from pycomm.cli.values import numbers, parse_size


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pattern", nargs="*", default=["all"], help="ping_pong, one_way, two_way, or all (all)"
    )
    options.add_sizes(parser, "8", "4M")
    options.add_calls(parser)
    parser.add_argument("-d", "--datatype", default="uint8", metavar="TYPES", help="element types (uint8)")
    parser.add_argument("-c", "--check", type=int, choices=(0, 1), default=1, help="check every element (1)")
    parser.add_argument(
        "--cores",
        metavar="all|N-N",
        help="a matrix of pairs of these cores: ping-pong latency of the smallest size, one-way bandwidth of"
        " the largest",
    )
    options.add_memory(parser)
    options.add_peers(parser)
    parser.add_argument("--columns", metavar="NAMES", help="as in pycomm bench")
    output.add_options(parser, csv=True, markdown=True)


def run(args: argparse.Namespace) -> int:
    try:
        output.check(args, "pycomm bench p2p")
    except ValueError as error:
        return fail(str(error))
    from pycomm.bench.peers import parse_peers
    from pycomm.bench.rows import Options
    from pycomm.bench.workers.data import POINT_TO_POINT
    from pycomm.cli import bench_session as session

    try:
        patterns = list(POINT_TO_POINT) if args.pattern == ["all"] else args.pattern
        for name in patterns:
            if name not in POINT_TO_POINT:
                raise ValueError(f"there is no pattern {name!r}: {', '.join(POINT_TO_POINT)}, or all")
        options.check_calls(args)
        dtypes = options.dtypes(args.datatype, "sum", ["send_recv"])
        sizes, peers = options.sizes(args), parse_peers(args.vs)
        offsets = options.offsets(args.offset, dtypes)
        columns = session.columns(args.columns)
        cores = checked_cores(args.cores) if args.cores is not None else []
        if cores:
            _check_matrix(args, dtypes)
    except ValueError as error:
        return fail(str(error))
    tables = [
        (
            name,
            Options(
                2,
                sizes,
                dtype,
                "sum",
                args.iters,
                args.warmup_iters,
                bool(args.check),
                offsets=offsets,
                huge=args.huge,
                cold=args.cold,
            ),
        )
        for name in patterns
        for dtype in dtypes
    ]
    if cores:
        from pycomm.cli import bench_cores

        ends = [parse_size(args.minbytes), parse_size(args.maxbytes)]
        pairs = list(itertools.combinations(cores, 2))
        return bench_cores.run(args, replace(tables[0][1], sizes=ends), pairs, peers)
    return session.run(args, tables, peers, columns)


def _check_matrix(args: argparse.Namespace, dtypes: Sequence[str]) -> None:
    """Checks the options: a matrix shows two patterns, each at one size and with one type."""
    unused = {
        "-f": args.stepfactor,
        "-i": args.stepbytes,
        "--columns": args.columns,
        "pattern": None if args.pattern == ["all"] else " ".join(args.pattern),
        "-d": args.datatype if len(dtypes) > 1 else None,
    }
    for option, value in unused.items():
        if value is not None:
            raise ValueError(
                f"--cores and {option} {value}: a matrix of cores shows ping_pong at size -b and one_way at"
                " size -e, with one type"
            )


def checked_cores(text: str) -> list[int]:
    allowed = sorted(os.sched_getaffinity(0))
    try:
        found = allowed if text == "all" else sorted(set(numbers(text)))
    except ValueError as error:
        raise ValueError(f"--cores {text}: {error}") from None
    if missing := [core for core in found if core not in allowed]:
        raise ValueError(f"--cores {text}: this process may not run on {', '.join(map(str, missing))}")
    if len(found) < 2:
        raise ValueError(f"--cores {text}: at least two cores are needed for a pair")
    return found
