"""The site that `make docs` builds with Sphinx.

It takes the repository's Markdown pages where they lie, so that their links hold on a git host and here, and
docs/api/, which it fills with docstrings.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

from sphinx.ext.autodoc.mock import _MockObject

import pycomm

ROOT = Path(__file__).parent.parent

project = "pycomm"
author = "the pycomm authors"
version = release = pycomm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/api/*.md"]
exclude_patterns = [".*", "build*", "dist", "pycomm", "csrc", "tests", "bench", "examples", "scripts"]
html_theme = "furo"
html_title = f"pycomm {release}"
html_extra_path = ["site"]  # index.html, which leads to the root document
html_copy_source = False
myst_heading_anchors = 4  # those of git hosts
autodoc_member_order = "bysource"
autodoc_mock_imports = ["jax", "torch"]  # which the documentation does without
_MockObject.__setitem__ = lambda *_: None  # pycomm.jax enters rules into JAX's tables
_MockObject.__bool__ = lambda _: True  # pycomm.torch asks torch.distributed.is_available()
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100

TABLE_OF_CONTENTS = """

```{toctree}
:hidden:
:caption: Use

docs/pytorch
docs/torch-distributed
docs/jax
docs/coming-from
docs/shared-arrays
docs/codecs
docs/algorithms
docs/errors
docs/environment
docs/benchmarks
```

```{toctree}
:hidden:
:caption: Reference

docs/api/index
```

```{toctree}
:hidden:
:caption: Inside

docs/architecture
docs/kernels
CONTRIBUTING
CHANGELOG
```
"""


def setup(app: Any) -> None:
    app.connect("source-read", adapt_page)
    app.connect("autodoc-process-docstring", from_markdown)
    app.connect("autodoc-process-signature", from_stub)


def adapt_page(app: Any, page: str, source: list[str]) -> None:
    """The README is the root; and a folder, which a git host lists, has no page here."""
    here = (ROOT / page).parent

    def without_folders(link: re.Match[str]) -> str:
        return link[1] if (here / link[2]).is_dir() else link[0]

    source[0] = re.sub(r"\[([^\]]*)\]\(([^)#:]+)\)", without_folders, source[0])
    if page == root_doc:
        source[0] += TABLE_OF_CONTENTS


def from_markdown(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings have one backquote around code, mean their asterisks, and name pages by path."""
    parts = re.split(r"(``.*?``|`[^`]*`)", "\n".join(lines), flags=re.DOTALL)
    parts[::2] = [re.sub(r"([*|\\]|_\b)", r"\\\1", text) for text in parts[::2]]
    parts[::2] = [re.sub(r"(docs/[\w-]+)\.md", r":doc:`\1.md </\1>`", text) for text in parts[::2]]
    parts[1::2] = [f"``{code.strip('`')}``" for code in parts[1::2]]
    lines[:] = "".join(parts).splitlines()


def from_stub(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """Signatures of the native module's functions have no types at run time: the stub has them."""
    function = STUB.get(".".join(name.split(".")[-2:]))
    if function is None or inspect.isfunction(obj):
        return None
    arguments = ast.unparse(function.args).removeprefix("self").removeprefix(", ")
    return f"({_short(arguments)})", _short(ast.unparse(function.returns)) if function.returns else None


def _short(annotation: str) -> str:
    return re.sub(r"\b(collections\.abc|typing)\.", "", annotation)


def _stub() -> dict[str, ast.FunctionDef]:
    module = ast.parse((ROOT / "pycomm" / "_native.pyi").read_text())
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    return {f"{c.name}.{f.name}": f for c in classes for f in c.body if _is_method(f)}


def _is_method(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and not node.decorator_list  # a property has no signature


STUB = _stub()
