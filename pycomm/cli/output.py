"""The destinations of the bench commands' tables, files and charts."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from pycomm.cli.main import fail, silence
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
        help="- is standard output, which then holds nothing else; {processor} in a path becomes its name",
    )
    if csv:
        parser.add_argument("--csv", metavar="PATH", help="likewise")
    if markdown:
        parser.add_argument("--markdown", metavar="PATH", help="likewise, as a table for documents")
    if plot:
        parser.add_argument("--plot", metavar="PATH", help="a chart, as PNG, PDF or SVG")


def check(args: argparse.Namespace, command: str) -> None:
    """Raises ValueError if a package or the place for a file is missing."""
    if not importlib.util.find_spec("rich"):
        raise ValueError(needs(command, "rich"))
    plot = getattr(args, "plot", None)
    if plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError(needs(f"{command} --plot", "matplotlib"))
    on_stdout = [f"--{option} -" for option in FILES if getattr(args, option, None) == "-"]
    if len(on_stdout) > 1:
        raise ValueError(
            f"{' and '.join(on_stdout)}: standard output can hold only one of them; name a file for the other"
        )
    taken: dict[str, str] = {}
    for option in (*FILES, "plot"):
        given = getattr(args, option, None)
        if not given or (given == "-" and option in FILES):
            continue
        path = Path(named(given))
        says = f"--{option} {given}"
        if option == "plot" and path.suffix.lower() not in CHARTS:
            raise ValueError(f"{says}: the name of a chart must end in {', '.join(CHARTS)}")
        if not path.parent.is_dir():
            raise ValueError(f"{says}: there is no directory {path.parent}")
        if path.is_dir():
            raise ValueError(f"{says}: is a directory, name a file")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{says}: cannot be written, name another place")
        other = taken.setdefault(os.path.realpath(path), says)
        if other != says:
            raise ValueError(f"{other} and {says}: are the same file, name two")


class Stream:
    """Standard output or error, for a console. If nobody reads it any more, or if there is no room, that is
    no exception: `lost` says why, and the rest is dropped. The results can still be written to files."""

    def __init__(self, of: TextIO) -> None:
        self._of = of
        self.lost = ""

    def write(self, text: str) -> int:
        self._do(lambda: self._of.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self._of.flush)

    def _do(self, what: Callable[[], Any]) -> None:
        try:
            what()
        except OSError as error:
            self.lost = self.lost or str(error.strerror)
            silence(self._of)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def console(stream: TextIO, width: int | None = None) -> Console:
    """A console that prints text as it is: names and errors contain no markup and no emoji."""
    from rich.console import Console

    return Console(file=cast(TextIO, Stream(stream)), width=width, markup=False, emoji=False)


def consoles(args: argparse.Namespace, width: int) -> tuple[Console, Console]:
    """The consoles for tables, `width` columns wide unless on a terminal, and for stderr."""
    errors = console(sys.stderr)
    taken = any(getattr(args, option, None) == "-" for option in FILES)
    to_terminal = errors.is_terminal if taken else sys.stdout.isatty()
    return console(sys.stderr if taken else sys.stdout, None if to_terminal else width), errors


def lost(console: Console) -> list[str]:
    """What could not be printed and why."""
    why = cast(Stream, console.file).lost
    return [f"the tables: {why}"] if why else []


def write(args: argparse.Namespace, outputs: Mapping[str, Callable[[str], None]]) -> list[str]:
    """Calls the writer of each option that was given with its path. A failure does not keep the others from
    being written; returns which failed and why."""
    failed = []
    for option, do in outputs.items():
        if given := getattr(args, option, None):
            try:
                do(named(given))
            except OSError as error:
                failed.append(f"--{option} {given}: {error.strerror or error}")
    return failed


def not_written(failed: list[str]) -> int:
    """Reports what was not written. Returns the exit code."""
    return fail(f"not written: {'; '.join(failed)}", 1) if failed else 0


def write_text(path: str, text: str) -> None:
    """Writes a file; `-` is standard output."""
    if path == "-":
        try:
            print(text.rstrip("\n"), flush=True)
        except OSError:
            silence(sys.stdout)
            raise
    else:
        Path(path).write_text(text.rstrip("\n") + "\n", newline="")


def named(path: str) -> str:
    """Replaces {processor} in a file's name by the processor, so that records of several machines coexist."""
    from pycomm.bench.machine import slug

    return path.replace("{processor}", slug()) if "{processor}" in path else path
