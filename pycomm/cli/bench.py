"""`pycomm bench`: measures the collectives, and on request MPI, Gloo and other builds of pycomm."""

from __future__ import annotations

import argparse

from pycomm.cli import bench_options as options
from pycomm.cli import output
from pycomm.cli.main import fail


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("collective", nargs="*", default=["all_reduce"], help="names, or all (all_reduce)")
    parser.add_argument("--ranks", default="2", metavar="N[,N]", help="processes (2)")
    options.add_sizes(parser, "4", "64M")
    options.add_calls(parser)
    parser.add_argument(
        "-d",
        "--datatype",
        default="float32",
        metavar="TYPES",
        help="element types, also by nccl-tests' names: float,half; or all (float32)",
    )
    parser.add_argument("-o", "--op", default="sum", help="operator of the reductions (sum)")
    parser.add_argument("-c", "--check", type=int, choices=(0, 1), default=1, help="check every element (1)")
    parser.add_argument(
        "--algorithms",
        default="",
        metavar="NAMES",
        help="all, or names, or your own as module:name (the library's choice)",
    )
    parser.add_argument("--buffers", default="plain", metavar="KINDS", help="plain,symmetric,shared (plain)")
    options.add_memory(parser)
    parser.add_argument(
        "--offsets",
        metavar="all|N,N",
        help="a sweep of addresses: these offsets of in and out, equal and unequal (all: 0,4,16,32,48,60,63)",
    )
    parser.add_argument("--persistent", action="store_true", help="all_reduce_init as well")
    parser.add_argument(
        "--codecs",
        default="none",
        metavar="NAMES",
        help="such as none,bf16,int8, or your own as module:name (none)",
    )
    options.add_peers(parser)
    parser.add_argument(
        "--columns",
        metavar="NAMES",
        help="for each form: time,min,p99 of the samples, call,call99 (median and p99 of single calls), wait,"
        "algbw,busbw,ratio (time,algbw,busbw)",
    )
    output.add_options(parser, csv=True, markdown=True)
    # nccl-tests' options for numbers of GPUs and threads; an error is better than a guess.
    parser.add_argument("-g", "--ngpus", help=argparse.SUPPRESS)
    parser.add_argument("-t", "--nthreads", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    try:
        output.check(args, "pycomm bench")
    except ValueError as error:
        return fail(str(error))
    from pycomm.bench.measure import COLLECTIVES
    from pycomm.bench.peers import parse_peers
    from pycomm.bench.rows import Options
    from pycomm.cli import bench_session as session

    try:
        for option, value in (("-g", args.ngpus), ("-t", args.nthreads)):
            if value is not None:
                raise ValueError(f"{option} {value}: say how many ranks there are with --ranks")
        collectives = list(COLLECTIVES) if args.collective == ["all"] else args.collective
        for name in collectives:
            if name not in COLLECTIVES:
                raise ValueError(f"there is no collective {name!r}: {', '.join(COLLECTIVES)}, or all")
        options.check_op(args.op)
        worlds = options.world_sizes(args.ranks)
        options.check_calls(args)
        dtypes = options.dtypes(args.datatype, args.op, collectives)
        algorithms = options.algorithms(args.algorithms, collectives)
        if "all_reduce" not in collectives and args.persistent:
            raise ValueError("--persistent: only all_reduce has a persistent form")
        sizes = options.sizes(args)
        buffers = args.buffers.split(",")
        if not set(buffers) <= {"plain", "symmetric", "shared"}:
            raise ValueError(f"--buffers {args.buffers}: plain, symmetric, shared, or several of these")
        if buffers != ["plain"] and collectives == ["send_recv"]:
            raise ValueError(f"--buffers {args.buffers}: send_recv is measured in plain buffers only")
        for option, given in ((f"--offset {args.offset}", args.offset), ("--huge", args.huge)):
            if given and buffers != ["plain"]:
                raise ValueError(
                    f"{option} and --buffers {args.buffers}: pycomm places symmetric and shared buffers"
                    " itself; use plain ones with this option"
                )
        codecs = options.codecs(args.codecs, collectives, dtypes, args.op)
        offsets = options.offsets(args.offset, dtypes)
        peers = parse_peers(args.vs)
        columns = session.columns(args.columns)
        if args.plot and collectives == ["barrier"]:
            raise ValueError("--plot: there is nothing to draw: a barrier has no size")
        if args.offsets is not None:
            from pycomm.cli import bench_addresses

            return bench_addresses.run(args, collectives, worlds, dtypes, sizes, peers)
    except ValueError as error:
        return fail(str(error))

    tables = [
        (
            name,
            Options(
                ranks=world,
                sizes=sizes,
                dtype=dtype,
                op=args.op,
                iterations=args.iters,
                warmup=args.warmup_iters,
                check=bool(args.check),
                algorithms=algorithms[name],
                buffers=buffers if name != "send_recv" else [kind for kind in buffers if kind == "plain"],
                persistent=args.persistent,
                codecs=codecs,
                offsets=offsets,
                huge=args.huge,
                cold=args.cold,
            ),
        )
        for world in worlds
        for name in collectives
        for dtype in dtypes
    ]
    return session.run(args, tables, peers, columns)
