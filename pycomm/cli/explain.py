"""`pycomm explain COLLECTIVE COUNT DTYPE --ranks N`."""

from __future__ import annotations

import argparse

import pycomm
from pycomm.cli.main import fail


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("collective", help="all_reduce, broadcast, ...")
    parser.add_argument("count", type=int, help="elements")
    parser.add_argument("dtype", nargs="?", default="float32", help="float32 if not given")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="of how many ranks (2)")


def run(args: argparse.Namespace) -> int:
    try:
        texts = pycomm.run_local(
            lambda comm: comm.explain(args.collective, args.count, args.dtype), args.ranks
        )
    except (TypeError, ValueError) as error:
        return fail(str(error))
    print(texts[0])
    return 0
