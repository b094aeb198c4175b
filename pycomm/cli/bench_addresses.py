"""`pycomm bench --offsets`: the sweep of addresses."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

from pycomm.bench import addresses, measure, report
from pycomm.bench.peers import Peer
from pycomm.bench.rows import Options
from pycomm.cli import bench_options as options
from pycomm.cli import output
from pycomm.cli.bench_session import Session


def run(
    args: argparse.Namespace,
    collectives: Sequence[str],
    worlds: Sequence[int],
    dtypes: Sequence[str],
    sizes: Sequence[int],
    peers: Sequence[Peer],
) -> int:
    """Raises ValueError for options that a sweep cannot have."""
    for option in ("offset", "algorithms", "persistent", "csv", "plot", "columns"):
        if getattr(args, option):
            raise ValueError(f"--offsets and --{option}: a sweep of addresses cannot use it")
    if args.buffers != "plain" or args.codecs != "none":
        raise ValueError("--offsets: a sweep of addresses uses plain buffers, without a codec")
    collectives = [name for name in collectives if name != "barrier"]
    if not collectives:
        raise ValueError("--offsets: a barrier has no buffers")
    of_dtype = {
        dtype: addresses.fitting(dtype)
        if args.offsets == "all"
        else options.numbers_beyond_a_page("--offsets", args.offsets, [dtype])
        for dtype in dtypes
    }
    tables = [
        (
            name,
            Options(
                world,
                sizes,
                dtype,
                args.op,
                args.iters,
                args.warmup_iters,
                check=bool(args.check),
                huge=args.huge,
                cold=args.cold,
            ),
        )
        for world in worlds
        for name in collectives
        for dtype in dtypes
    ]
    session = Session(args, sum(1 for name, of in tables for _ in measure.cases(name, of)))
    found: list[addresses.Sweep] = []
    with session.measuring():
        for world, of_world in itertools.groupby(tables, lambda table: table[1].ranks):
            with session.sets(world, peers) as (ours, theirs):
                session.say(report.engines(world, session.versions))
                for name, of in of_world:
                    shown = ", ".join(map(str, of_dtype[of.dtype]))
                    session.say(
                        "", f"{name}, {of.dtype}, {world} ranks, first bytes {shown} beyond a page", ""
                    )
                    session.say(*addresses.HEADING)
                    for rows in addresses.sweep(name, of, of_dtype[of.dtype], ours, theirs, session.warn):
                        found += rows
                        session.say(*map(addresses.line, rows))
                        session.advance(name)
    text = session.as_json([row.as_dict() for row in found])
    session.write(
        {
            "json": lambda path: output.write_text(path, text),
            "markdown": lambda path: output.write_text(path, addresses.markdown(found)),
        }
    )
    wrong = sum(row.wrong for row in found if row.engine == "pycomm")
    session.say("")
    session.close(wrong, bool(found))
    return session.code(wrong, bool(found))
