"""The README and the docs: their Python blocks run, their links exist."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import docs_blocks
import pytest

import pycomm
from pycomm import _native, codecs
from pycomm.codecs.kinds import DEFAULTS

ROOT = Path(__file__).parents[2]
HELLO = ROOT / "examples" / "hello.py"
EXAMPLES = ROOT / "examples" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", EXAMPLES, *sorted((ROOT / "docs").rglob("*.md"))]
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]


def test_the_script_of_the_readme_is_hello() -> None:
    script = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert script and script[1] == HELLO.read_text()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_hello_runs(ranks: int) -> None:
    command = [sys.executable, "-m", "pycomm", "run", "-n", str(ranks), str(HELLO)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    total = f"x = [{ranks * (ranks + 1) // 2}. "
    said = sorted(done.stdout.splitlines())
    assert len(said) == ranks
    for rank, line in enumerate(said):
        assert line.startswith(f"[{rank}] rank {rank} of {ranks}: {total}"), line
        assert line.endswith(f"my group = {list(range(rank % 2, ranks, 2))}".replace(",", "")), line


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_blocks_run_on_two_ranks(page: Path, tmp_path: Path) -> None:
    found = list(docs_blocks.blocks(page.read_text()))
    assert len(found) == page.read_text().count("```python"), "a fence that docs_blocks.py does not see"
    command = [sys.executable, "-m", "pycomm", "run", "-n", "2", docs_blocks.__file__, str(page)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = [line for line in done.stdout.splitlines() if line.startswith("[0] ") and "skipped" in line]
    if len(skipped) == len(found):
        pytest.skip("; ".join(line.removeprefix("[0] ") for line in skipped))


def test_a_wrong_block_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n<!-- setup\nx = 1\n-->\n<!-- raises KeyError -->\n```python\nx.y\n```\n")
    with pytest.raises(AttributeError) as caught:
        docs_blocks.run(page)
    assert caught.traceback[-1].lineno == 7  # line of the page, counted from 0
    page.write_text("<!-- raises ValueError -->\n```python\nx = 1\n```\n")
    with pytest.raises(AssertionError, match="page.md:3 raises no ValueError"):
        docs_blocks.run(page)
    page.write_text("<!-- needs no_such_module -->\n```python\n1 / 0\n```\n")
    docs_blocks.run(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        there = page.parent / target if target else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, anchor


def test_every_example_is_listed() -> None:
    rows = re.findall(r"^\| \[(\w+\.py)\]\(\1\) \|", EXAMPLES.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in EXAMPLES.parent.glob("*.py"))


def test_the_readme_of_a_package_index_has_no_dead_links() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    text = (ROOT / "README.md").read_text()
    for rule in settings["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert not re.findall(r"\]\((?!https?:).*?\)", text)
    assert "<!--" not in text
    assert "docs/architecture.md has the rest on a page" in text  # the words stay


def what_there_is(page: str) -> list[list[str]]:
    """The rows of the first table under this heading, cell by cell."""
    text = (ROOT / "docs" / page).read_text().split("## What there is", 1)[1]
    rows = itertools.takewhile(bool, text[text.index("|") :].splitlines())
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in itertools.islice(rows, 2, None)]


def test_every_algorithm_is_in_the_docs() -> None:
    found: dict[str, list[str]] = {}
    collectives: list[str] = []
    for collective, algorithm, *_ in what_there_is("algorithms.md"):
        collectives = collective.split(", ") if collective else collectives  # empty: that of the row above
        for each in collectives:
            found.setdefault(each, []).append(algorithm.strip("`"))
    for collective in _native.COLLECTIVES:
        assert sorted(found[collective]) == sorted(_native.algorithms(collective)), collective


def test_every_codec_is_in_the_docs() -> None:
    names = [name for row in what_there_is("codecs.md") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(names) == sorted(DEFAULTS)
    assert {type(codec).__name__ for codec in DEFAULTS.values()} <= set(codecs.__all__)


def public() -> dict[str, object]:
    """The public objects by their names in the reference."""
    found = {f"pycomm.{name}": getattr(pycomm, name) for name in pycomm.__all__}
    for module in (found.pop("pycomm.codecs"), pycomm.cuda):
        found |= {f"{module.__name__}.{name}": getattr(module, name) for name in module.__all__}
    members = [name for name in dir(pycomm.Communicator) if not name.startswith("_")]
    found |= {f"pycomm.Communicator.{name}": getattr(pycomm.Communicator, name) for name in members}
    return found


REFERENCE = set(
    re.findall(
        r"^\.\. (?:auto|py:)\w+:: ([\w.]+)$",
        "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")),
        re.MULTILINE,
    )
)


@pytest.mark.parametrize("name", public())
def test_every_public_name_is_in_the_reference(name: str) -> None:
    assert name in REFERENCE


@pytest.mark.parametrize("name", sorted(public().keys() - {"pycomm.__version__"}))
def test_every_public_name_has_a_docstring(name: str) -> None:
    what = public()[name]
    text = what.__doc__ or ""
    if inspect.isclass(what):
        assert not text.startswith(f"{what.__name__}("), "a dataclass's own words"
        assert text != getattr(what.__base__, "__doc__", None)
        for name, member in vars(what).items():
            if inspect.isfunction(member) and not name.startswith("_"):
                assert inspect.getdoc(getattr(what, name)), name
    assert text.strip() or isinstance(what, property)


ROOTS = {
    "comm": pycomm.Communicator,
    "pycomm": pycomm,
    "bucket": pycomm.Bucket,
    "feedback": codecs.ErrorFeedback,
    "work": pycomm.Work,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_calls_in_the_text_are_of_this_library(page: Path) -> None:
    """In calls between backquotes, such as `comm.all_reduce(x, op="avg")`, names and keywords exist."""
    text = page.read_text()
    if page.name == "coming-from.md":
        text = re.sub(
            r"^\|[^|]*\|", "", text, flags=re.MULTILINE
        )  # the first column belongs to other libraries
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        try:
            tree = ast.parse(span)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                _named(node)
            elif isinstance(node, ast.Call) and (called := _named(node.func)) is not None:
                unknown = {keyword.arg for keyword in node.keywords if keyword.arg} - _parameters(called)
                assert not unknown, f"{span}: {unknown}"


def _parameters(called: object) -> set[str]:
    try:
        return set(inspect.signature(called).parameters)
    except ValueError:  # pybind11 writes the signature into the docstring's first line, with types
        return set(re.findall(r"(\w+): ", called.__doc__.splitlines()[0]))


def _named(node: ast.expr) -> object:
    """The object that `comm.x` or `pycomm.codecs.X` names; None for names with another root."""
    if isinstance(node, ast.Name):
        return ROOTS.get(node.id)
    of = _named(node.value) if isinstance(node, ast.Attribute) else None
    if of is None or not isinstance(node, ast.Attribute) or node.attr.startswith("_"):
        return None
    return getattr(of, node.attr)
