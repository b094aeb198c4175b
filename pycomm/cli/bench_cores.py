"""`pycomm bench p2p --cores`: two ranks on every pair of cores, a matrix for each engine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

from pycomm.bench import measure
from pycomm.bench.peers import Peer
from pycomm.bench.rows import Options, Row
from pycomm.cli.bench_session import Session, finish

Pair = tuple[int, int]


def run(args: argparse.Namespace, options: Options, pairs: Sequence[Pair], peers: Sequence[Peer]) -> int:
    tables = [
        ("ping_pong", replace(options, sizes=options.sizes[:1])),
        ("one_way", replace(options, sizes=options.sizes[-1:])),
    ]
    session = Session(args, len(pairs) * len(tables))
    rows: list[Row] = []
    with session.measuring():
        for pair in pairs:
            with session.sets(2, peers, [[core] for core in pair]) as (ours, theirs):
                for name, of in tables:
                    for found in measure.measure(name, of, ours, theirs, session.warn):
                        for row in found:
                            row.cores = pair
                        rows += found
                        session.advance(f"{name}, cores {pair[0]} and {pair[1]}")
    for engine in ["pycomm", *(peer.name for peer in peers)]:
        for title, name, figure in (
            (f"latency of {options.sizes[0]} B in us", "ping_pong", lambda row, us: us),
            (f"one-way bandwidth of {options.sizes[-1]} B in GB/s", "one_way", Row.algbw),
        ):
            of_name = [row for row in rows if row.collective == name]
            session.say("", f"{engine}: {title}", "", *matrix(of_name, engine, figure))
    finish(session, rows, [peer.name for peer in peers if peer.is_mpi])
    return session.code(sum(row.wrong for row in rows), bool(rows))


def matrix(rows: Sequence[Row], engine: str, figure: Callable[[Row, float], float]) -> list[str]:
    found: dict[Pair, str] = {}
    for row in rows:
        forms = row.forms if engine == "pycomm" else row.beside.get(engine, {})
        if forms and row.cores:
            found[row.cores] = f"{figure(row, forms['out_of_place'].median_us):.2f}"
    cores = sorted({core for row in rows if row.cores for core in row.cores})
    width = max(len(text) for text in ["core", *found.values()]) + 2
    lines = [f"{'core':>{width}}" + "".join(f"{core:>{width}}" for core in cores)]
    for first in cores:
        cells = [found.get((min(first, second), max(first, second)), "-") for second in cores]
        lines.append(f"{first:>{width}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return lines
