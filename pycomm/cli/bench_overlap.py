"""`pycomm bench overlap`: how much of an asynchronous call runs while the rank computes."""

from __future__ import annotations

import argparse
import itertools

from pycomm.cli import bench_options as options
from pycomm.cli import output
from pycomm.cli.main import fail


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("collective", nargs="*", default=["all_reduce"], help="names, or all (all_reduce)")
    parser.add_argument("--ranks", default="2", metavar="N[,N]", help="processes (2)")
    options.add_sizes(parser, "64K", "64M")
    options.add_calls(parser)
    parser.add_argument(
        "-d", "--datatype", default="float32", metavar="TYPES", help="element types (float32)"
    )
    parser.add_argument("-o", "--op", default="sum", help="operator of the reductions (sum)")
    parser.add_argument("-c", "--check", type=int, choices=(0, 1), default=1, help="check every element (1)")
    options.add_peers(parser)
    output.add_options(parser, plot=False)


def run(args: argparse.Namespace) -> int:
    try:
        output.check(args, "pycomm bench overlap")
    except ValueError as error:
        return fail(str(error))
    from pycomm.bench import measure, overlap, report
    from pycomm.bench.peers import parse_peers
    from pycomm.bench.rows import Options
    from pycomm.cli.bench_session import Session
    from pycomm.launch import split_cores

    try:
        collectives = list(overlap.COLLECTIVES) if args.collective == ["all"] else args.collective
        for name in collectives:
            if name not in overlap.COLLECTIVES:
                raise ValueError(f"there is no collective {name!r}: {', '.join(overlap.COLLECTIVES)}, or all")
        options.check_op(args.op)
        options.check_calls(args)
        worlds = options.world_sizes(args.ranks)
        dtypes = options.dtypes(args.datatype, args.op, collectives)
        sizes, peers = options.sizes(args), parse_peers(args.vs)
    except ValueError as error:
        return fail(str(error))
    tables = [
        (name, Options(world, sizes, dtype, args.op, args.iters, args.warmup_iters, bool(args.check)))
        for world in worlds
        for name in collectives
        for dtype in dtypes
    ]
    session = Session(args, sum(1 for name, of in tables for _ in measure.cases(name, of)))
    found: list[overlap.Overlap] = []
    with session.measuring():
        for world, of_world in itertools.groupby(tables, lambda table: table[1].ranks):
            # Ranks are not pinned to one core: their progress threads get the rest of their cores.
            shares = [sorted(share) for share in split_cores(world)]
            with session.sets(world, peers, shares) as (ours, theirs):
                session.say(report.engines(world, session.versions))
                for name, of in of_world:
                    session.say("", f"{name}, {of.dtype}, {world} ranks", "", *overlap.HEADING)
                    for rows in overlap.measure(name, of, ours, theirs, session.warn):
                        found += rows
                        session.say(*map(overlap.line, rows))
                        session.advance(name)
    text = session.as_json([row.as_dict() for row in found])
    session.write({"json": lambda path: output.write_text(path, text)})
    return session.code(sum(row.wrong for row in found if row.engine == "pycomm"), bool(found))
