"""Where the tables, files and charts of the bench commands go."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pycomm.cli.values import needs

if TYPE_CHECKING:
    from rich.console import Console


CHARTS = (".png", ".pdf", ".svg")
FILES = ("json", "csv", "markdown")  # `-` is standard output


def add_options(
    parser: argparse.ArgumentParser, csv: bool = False, markdown: bool = False, plot: bool = True
) -> None:
    parser.add_argument(
        "--json",
        metavar="PATH",
        help="- is standard output, which then holds nothing else; {processor} in a name is this one",
    )
    if csv:
        parser.add_argument("--csv", metavar="PATH", help="likewise")
    if markdown:
        parser.add_argument("--markdown", metavar="PATH", help="likewise; a table for documents")
    if plot:
        parser.add_argument("--plot", metavar="PATH", help="a PNG, or a PDF or SVG")


def check(args: argparse.Namespace, command: str) -> None:
    """Raises ValueError for what is missing: a package, or the directory of a file."""
    if not importlib.util.find_spec("rich"):
        raise ValueError(needs(command, "rich"))
    plot = getattr(args, "plot", None)
    if plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError(needs(f"{command} --plot", "matplotlib"))
    on_stdout = [f"--{option} -" for option in FILES if getattr(args, option, None) == "-"]
    if len(on_stdout) > 1:
        raise ValueError(
            f"{' and '.join(on_stdout)}: standard output holds one of them; name a file for the other"
        )
    for option in (*FILES, "plot"):
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
    taken = any(getattr(args, option, None) == "-" for option in FILES)
    to_terminal = errors.is_terminal if taken else sys.stdout.isatty()
    return Console(stderr=taken, width=None if to_terminal else width), errors


def write_json(args: argparse.Namespace, text: str) -> None:
    write(args, "json", text + "\n")


def write(args: argparse.Namespace, option: str, text: str) -> None:
    """To the file that --`option` names, if it is given."""
    if getattr(args, option, None):
        with opened(getattr(args, option)) as file:
            file.write(text)


def named(path: str) -> str:
    """{processor} in the name of a file is the processor: records of several machines lie side by side."""
    from pycomm.bench.machine import slug

    return path.replace("{processor}", slug()) if "{processor}" in path else path


@contextmanager
def opened(path: str) -> Iterator[TextIO]:
    path = named(path)
    if path == "-":
        yield sys.stdout
    else:
        with open(path, "w", newline="") as file:
            yield file
