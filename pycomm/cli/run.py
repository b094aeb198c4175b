"""`pycomm run -n N [-m] script args`."""

from __future__ import annotations

import argparse
import os
import re
import sys

from pycomm.cli.main import fail
from pycomm.cli.values import check_ranks
from pycomm.launch import GRACE_S, NOTICE_S, StartError, launch


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Each rank runs on its own cores if there are enough, reads nothing from stdin, and prints"
        " lines that start with its number. When one fails the others have"
        f" {NOTICE_S:.0f} s to end by themselves, then get SIGTERM and, {GRACE_S:.0f} s later, SIGKILL; the"
        " exit code of the first that failed is this command's. SIGINT (Ctrl-C), SIGTERM and SIGHUP are"
        f" passed on at once, with SIGKILL {GRACE_S:.0f} s later; a second one kills at once."
    )
    # The other names are those of mpirun, horovodrun and torchrun.
    names = ("-n", "-np", "--n", "--np", "--nproc-per-node", "--nproc_per_node")
    parser.add_argument(*names, dest="size", type=int, metavar="N", help="how many ranks (required)")
    parser.add_argument(
        "--on-failure",
        choices=("end", "wait"),
        default="end",
        help="what happens to the other ranks when one fails: they are ended, or left alone, to go on with"
        " shrink() (default: end)",
    )
    parser.add_argument(
        "-m", dest="module", action="store_true", help="SCRIPT names a module, as for python -m"
    )
    parser.add_argument("script", help="the Python file to run")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")


def run(args: argparse.Namespace) -> int:
    if args.size is None:
        after = next((arg for arg in args.args if re.fullmatch(r"(-n|-np|--n|--np)(=?\d+)?", arg)), None)
        right = f"pycomm run -n N {'-m ' if args.module else ''}{args.script}"
        if after:
            return fail(f"`{after}` comes after the script and so is an argument of it: write `{right}`")
        return fail(f"how many ranks? Write `{right}`")
    try:
        check_ranks("-n", args.size)
    except ValueError as error:
        return fail(str(error))
    if not args.module and not os.path.exists(args.script):
        if re.fullmatch(r"python[\d.]*", os.path.basename(args.script)):
            return fail(f"there is no file {args.script}: leave out `{args.script}`, the ranks run Python")
        return fail(f"there is no file {args.script}: give a path, or -m and the name of a module")
    command = [sys.executable, *(["-m"] if args.module else []), args.script, *args.args]
    try:
        return launch(command, args.size, args.on_failure)
    except StartError as error:
        return fail(str(error))
