"""Runs the Python blocks of a page in order and in one namespace, as a reader would, on each rank of
`pycomm run -n 2 docs_blocks.py PAGE`.

A comment before a block, which the rendered page does not show, gives the test instructions:

    <!-- setup           the context of a block that is only part of a program:
    comm = ...           Python, run before it
    -->
    <!-- needs torch -->         skip the next block (and its setup) if this module is missing
    <!-- needs a GPU -->         the same without a GPU, or without its kernels
    <!-- raises ValueError -->   the next block must end with this exception
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PIECE = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$|^<!-- needs (?P<needs>[^\n]*) -->$|^<!-- raises (?P<raises>\w+) -->$"
    r"|^```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    line: int  # of its first line of code, counted from 1
    code: str
    setup: tuple[tuple[int, str], ...]
    needs: tuple[str, ...]
    raises: str | None


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page with the instructions of its comments."""
    setup: list[tuple[int, str]] = []
    needs: list[str] = []
    raises = None
    for piece in PIECE.finditer(text):
        if piece["code"] is None:
            if piece["setup"] is not None:
                setup.append((_line(text, piece.start("setup")), piece["setup"]))
            elif piece["needs"] is not None:
                needs.append(piece["needs"])
            else:
                raises = piece["raises"]
            continue
        yield Block(_line(text, piece.start("code")), piece["code"], tuple(setup), tuple(needs), raises)
        setup, needs, raises = [], [], None


def run(page: Path) -> None:
    """Prints a line for each skipped block; raises a block's exceptions with the page's line numbers."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page.read_text()):
        missing = [need for need in block.needs if not _there(need)]
        if missing:
            print(f"{page.name}:{block.line} needs {missing[0]}: skipped")
            continue
        for line, code in block.setup:
            exec(_compiled(page, line, code), namespace)
        code = _compiled(page, block.line, block.code)
        if block.raises is None:
            exec(code, namespace)
            continue
        try:
            exec(code, namespace)
        except Exception as error:
            if type(error).__name__ != block.raises:
                raise
        else:
            raise AssertionError(f"{page.name}:{block.line} raises no {block.raises}")


def _compiled(page: Path, line: int, code: str) -> object:
    return compile("\n" * (line - 1) + code, str(page), "exec", dont_inherit=True)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _there(need: str) -> bool:
    if need == "a GPU":
        import pycomm.cuda

        return pycomm.cuda.is_available()
    return importlib.util.find_spec(need) is not None


if __name__ == "__main__":
    run(Path(sys.argv[1]))
