"""`pycomm explain COLLECTIVE COUNT DTYPE --ranks N`."""

from __future__ import annotations

import argparse

import pycomm
from pycomm.bench.workers.load import is_own
from pycomm.cli.bench_options import own_algorithm, own_codec
from pycomm.cli.main import fail, show
from pycomm.cli.values import check_ranks, dtype_name, parse_size


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("collective", help="all_reduce, broadcast, ...")
    parser.add_argument("count", help="elements of one block (all_to_all: for one rank): 1000, 4K, 1M")
    parser.add_argument("dtype", nargs="?", default="float32", help="float32 if not given")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="number of ranks (2)")
    parser.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="number of nodes that share the ranks evenly (1)"
    )
    parser.add_argument("--op", default="sum", help="operator of the reductions (sum)")
    parser.add_argument(
        "--algorithm", metavar="NAME", help="a name, or your own as module:name (the library's choice)"
    )
    parser.add_argument(
        "--codec",
        default="none",
        metavar="NAME",
        help="such as int8 or int8@wire, or your own as module:name (none)",
    )
    parser.add_argument(
        "--root", type=int, default=0, metavar="RANK", help="root of broadcast, reduce, ... (0)"
    )
    parser.add_argument("--deterministic", action="store_true", help="sum in the same order at every size")


def run(args: argparse.Namespace) -> int:
    try:
        check_ranks("--ranks", args.ranks)
        if not 1 <= args.nodes <= args.ranks:
            raise ValueError(f"--nodes {args.nodes}: {args.ranks} ranks can be on 1 to {args.ranks} nodes")
        if not 0 <= args.root < args.ranks:
            raise ValueError(f"--root {args.root}: the ranks are 0 to {args.ranks - 1}")
        count = parse_size(args.count)
        own = is_own(args.algorithm or "")
        algorithm = own_algorithm(args.algorithm) if own else args.algorithm
        codec = None if args.codec == "none" else own_codec(args.codec)
        texts = pycomm.run_local(
            lambda comm: comm.explain(
                args.collective,
                count,
                dtype_name(args.dtype),
                op=args.op,
                algorithm=algorithm,
                root=args.root,
                deterministic=args.deterministic,
                codec=codec,
            ),
            args.ranks,
            nodes=args.nodes,
        )
    except (TypeError, ValueError) as error:
        return fail(str(error))
    return show(texts[0])
