"""Says in words what is wrong with the arguments of a native function.

pybind11 reports only that the call does not fit the signature, which it shows in C++'s terms. Here that
signature is parsed as Python and compared with the call. None of this runs unless a call has failed.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pycomm.checks import shown


def wrong_arguments(text: str, args: Sequence[Any], keywords: dict[str, Any]) -> str:
    """The message for a call with these arguments; `text` is pybind11's message."""
    function = _Function(text)
    takes = function.parameters[function.takes_self :]
    values = args[1:] if function.takes_self or function.is_constructor else args
    positional = [each for each in takes if not each.keyword_only]
    if len(values) > len(positional):
        return (
            f"{function.name}() takes {_counted(len(positional), 'positional argument')} but"
            f" {len(values)} {'was' if len(values) == 1 else 'were'} given{_listed(takes)}"
        )
    given = dict(zip((each.name for each in positional), values, strict=False))
    for name, value in keywords.items():
        if name in given:
            return f"{function.name}() got `{name}` twice: by its place and by its name"
        if name not in (each.name for each in takes):
            near = difflib.get_close_matches(name, [each.name for each in takes], 1)
            return (
                f"{function.name}() got an unexpected keyword argument '{name}'"
                f"{f' (did you mean {near[0]!r}?)' if near else ''}{_listed(takes)}"
            )
        given[name] = value
    for each in takes:
        if each.name not in given and not each.optional:
            return f"{function.name}() needs `{each.name}`{_listed(takes)}"
    for each in takes:
        if each.name in given and not each.fits(given[each.name]):
            return f"`{each.name}` is {shown(given[each.name])}: pass {each.wanted()}"
    return _out_of_range(function.name, given)


def _out_of_range(function: str, given: dict[str, Any]) -> str:
    """For arguments that all have the right types: an integer is too large or negative."""
    integers = {name: int(value) for name, value in given.items() if _is_integer(value)}
    if not integers:
        return f"{function}() cannot take these arguments: see its help()"
    name = max(integers, key=lambda each: (integers[each] < 0, abs(integers[each])))
    return f"`{name}` is {integers[name]}: {'at least 0 is needed' if integers[name] < 0 else 'too large'}"


class _Function:
    """A signature such as `split(self: Communicator, color: SupportsInt, key: SupportsInt = 0) -> object`."""

    def __init__(self, text: str) -> None:
        self.name, _, rest = text.partition("(): incompatible ")
        line = next(line for line in rest.splitlines() if line.startswith("    1. "))[7:]
        written, _, signature = line.partition("(")
        self.is_constructor = bool(written)  # then the class is written, and no `self`
        if self.is_constructor:
            self.name = written.rpartition(".")[2]
        self.parameters = _parameters("(" + signature)
        self.takes_self = bool(self.parameters) and self.parameters[0].name == "self"


def _parameters(signature: str) -> list[_Parameter]:
    definition = ast.parse(f"def f{signature}: ...").body[0]
    assert isinstance(definition, ast.FunctionDef)
    of = definition.args
    required = len(of.args) - len(of.defaults)
    found = [_Parameter(each.arg, each.annotation, i >= required, False) for i, each in enumerate(of.args)]
    pairs = zip(of.kwonlyargs, of.kw_defaults, strict=True)
    return found + [
        _Parameter(each.arg, each.annotation, default is not None, True) for each, default in pairs
    ]


@dataclass
class _Parameter:
    name: str
    annotation: ast.expr | None
    optional: bool
    keyword_only: bool

    def fits(self, value: Any) -> bool:
        return any(_fits(each, value) for each in _alternatives(self.annotation))

    def wanted(self) -> str:
        texts = [_wanted(each) for each in _alternatives(self.annotation)]
        return " or ".join(dict.fromkeys(text for text in texts if text)) or "an object"


def _alternatives(annotation: ast.expr | None) -> list[ast.expr]:
    if isinstance(annotation, ast.BinOp):
        return _alternatives(annotation.left) + _alternatives(annotation.right)
    if _word(annotation) == "Optional" and isinstance(annotation, ast.Subscript):
        return [*_alternatives(annotation.slice), ast.Constant(None)]
    return [annotation or ast.Name("object")]


def _word(annotation: ast.expr | None) -> str:
    """A type's bare name: `typing.SupportsInt`: SupportsInt; `collections.abc.Sequence[object]`: Sequence."""
    if isinstance(annotation, ast.Subscript):
        annotation = annotation.value
    return ast.unparse(annotation).rpartition(".")[2] if annotation else ""


# The words that ask for a value of each type.
_WORDS = {
    "int": "an integer",
    "SupportsInt": "an integer",
    "SupportsIndex": "an integer",
    "float": "a number",
    "SupportsFloat": "a number",
    "str": "a string",
    "bool": "True or False",
    "Callable": "a function",
    "None": "",
}
_SEQUENCES = ("Sequence", "list", "List")


def _fits(annotation: ast.expr, value: Any) -> bool:
    word = _word(annotation)
    if word in ("object", "handle", "Any"):
        return True
    if word == "None":
        return value is None
    if word in ("int", "SupportsInt", "SupportsIndex"):
        return _is_integer(value)
    if word in ("float", "SupportsFloat"):
        return hasattr(value, "__float__") or _is_integer(value)
    if word == "bool":
        return value is None or hasattr(value, "__bool__")
    if word == "Callable":
        return callable(value)
    if word in _SEQUENCES:
        if (
            isinstance(value, (str, bytes))
            or not hasattr(value, "__getitem__")
            or not hasattr(value, "__len__")
        ):
            return False
        item = annotation.slice if isinstance(annotation, ast.Subscript) else None
        return all(any(_fits(each, part) for each in _alternatives(item)) for part in value)
    return any(kind.__name__ == word for kind in type(value).__mro__)


def _wanted(annotation: ast.expr) -> str:
    word = _word(annotation)
    if word in _SEQUENCES:
        item = annotation.slice if isinstance(annotation, ast.Subscript) else None
        plural = {"an integer": "integers", "a number": "numbers", "a string": "strings"}
        of = [_wanted(each) for each in _alternatives(item)]
        return f"a list of {plural.get(of[0], of[0].rpartition(' ')[2] + ' objects' if of[0] else 'objects')}"
    return _WORDS.get(word, f"a {word}" if word not in ("object", "handle", "Any") else "")


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _counted(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'s' * (count != 1)}"


def _listed(parameters: list[_Parameter]) -> str:
    names = ", ".join(each.name for each in parameters)
    return f": it takes {names}" if names else ": it takes none"
