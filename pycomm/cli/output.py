"""Where the tables, files and charts of the bench commands go."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pycomm.cli.values import needs

if TYPE_CHECKING:
    from rich.console import Console


CHARTS = (".png", ".pdf", ".svg")


def add_options(parser: argparse.ArgumentParser, csv: bool = False) -> None:
    parser.add_argument("--json", metavar="PATH", help="- is standard output, which then holds nothing else")
    if csv:
        parser.add_argument("--csv", metavar="PATH")
    parser.add_argument("--plot", metavar="PATH", help="a PNG, or a PDF or SVG")


def check(args: argparse.Namespace, command: str) -> None:
    """Raises ValueError for what is missing: a package, or the directory of a file."""
    if not importlib.util.find_spec("rich"):
        raise ValueError(needs(command, "rich"))
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError(needs(f"{command} --plot", "matplotlib"))
    for option in ("json", "csv", "plot"):
        path = getattr(args, option, None)
        if path and not Path(path).parent.is_dir():
            raise ValueError(f"--{option} {path}: there is no directory {Path(path).parent}")
        if path and Path(path).is_dir():
            raise ValueError(f"--{option} {path}: is a directory, name a file")
        if option == "plot" and path and Path(path).suffix.lower() not in CHARTS:
            raise ValueError(f"--plot {path}: the name of a chart ends in {', '.join(CHARTS)}")


def consoles(args: argparse.Namespace, width: int) -> tuple[Console, Console]:
    """The one for tables, `width` columns wide where nobody looks at it on a terminal, and stderr's."""
    from rich.console import Console

    errors = Console(stderr=True)
    to_terminal = errors.is_terminal if args.json == "-" else sys.stdout.isatty()
    return Console(stderr=args.json == "-", width=None if to_terminal else width), errors


def write_json(args: argparse.Namespace, text: str) -> None:
    if args.json == "-":
        print(text)
    elif args.json:
        Path(args.json).write_text(text + "\n")
