"""What errors tell a new user: the value, and what to write instead."""

import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import pycomm
from pycomm import Communicator, _native

Ranks = Callable[..., list[Any]]


@pytest.fixture
def comm() -> Any:
    comms = [Communicator(each) for each in _native.join_threads(1)]
    yield comms[0]
    comms[0].close()


def message(call: Callable[[], Any], kind: type[Exception] = TypeError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("op", "meant"),
    [("mean", "avg"), ("average", "avg"), ("SUM", "sum"), ("smu", "sum"), ("maximum", "max"), ("add", "sum")],
)
def test_a_misspelt_operator(comm: Any, op: str, meant: str) -> None:
    text = message(lambda: comm.all_reduce(np.ones(2), op=op), ValueError)
    assert f"'{op}'" in text and f"did you mean '{meant}'?" in text
    assert "sum, prod, min, max, avg, band, bor, bxor" in text


def test_a_misspelt_algorithm(comm: Any) -> None:
    text = message(lambda: comm.all_reduce(np.ones(2), algorithm="rnig"), ValueError)
    assert """no algorithm "rnig" (did you mean 'ring'?); it has""" in text


def test_an_operator_of_another_library(comm: Any) -> None:
    class ReduceOp:
        name = "SUM"

    for op, meant in ((ReduceOp(), "sum"), (np.add, "sum"), (np.maximum, "max"), (np.mean, "avg")):
        text = message(lambda op=op: comm.all_reduce(np.ones(2), op=op))
        assert 'pass a name, as in op="avg"' in text and f"did you mean '{meant}'?" in text
    assert "pass a name" in message(lambda: comm.all_reduce(np.ones(2), op=3))


def test_a_factor_needs_an_object(comm: Any) -> None:
    for op in ("premul_sum", "premul_sum(2)"):
        text = message(lambda op=op: comm.all_reduce(np.ones(2), op=op), ValueError)
        assert f"`op` is '{op}': pass an object, as in op=pycomm.premul_sum(0.5)" in text


def test_a_misspelt_codec(comm: Any) -> None:
    for codec in ("in8", "Int8", "int8bit"):
        text = message(lambda codec=codec: comm.all_reduce(np.ones(2), codec=codec), ValueError)
        assert f"`codec` is '{codec}' (did you mean 'int8'?)" in text


@pytest.mark.parametrize("factor", [0.5, np.float32(0.5), np.array(0.5), Fraction(1, 2), Decimal("0.5")])
def test_factors_as_people_have_them(comm: Any, factor: Any) -> None:
    assert comm.all_reduce(np.full(3, 2.0), op=pycomm.premul_sum(factor)).tolist() == [1, 1, 1]


def test_a_factor_that_is_no_finite_number() -> None:
    for factor in (math.nan, math.inf):
        text = message(lambda factor=factor: pycomm.premul_sum(factor), ValueError)
        assert f"`factor` is {factor}: pass a finite number" in text


@pytest.mark.parametrize("loss", [3.0, 3, True, 1j, np.float32(3), np.int64(3)])
def test_a_loss_that_is_a_number(comm: Any, loss: Any) -> None:
    for call in (comm.all_reduce, comm.broadcast, comm.all_gather):
        text = message(lambda call=call: call(loss))
        assert f"`x` is {loss!r}, a number" in text
        assert 'comm.all_reduce(np.array([loss]), op="avg")[0]' in text


def test_no_gradient_in_a_list(comm: Any) -> None:
    x = np.ones(2)
    assert message(lambda: comm.all_reduce([x, None])).startswith("`x[1]` is None: no gradient?")
    assert message(lambda: comm.all_reduce([x], out=[3.0])).startswith("`out[0]` is 3.0, a number")
    assert message(lambda: comm.broadcast([x, x[::-1]]), ValueError).startswith("`x[1]` is not contiguous")
    assert "list(x.values())" in message(lambda: comm.broadcast({"w": x}))
    assert "`x` is a generator: pass a list" in message(lambda: comm.all_reduce(x for _ in range(2)))
    assert "`x` is a list: pass one array" in message(lambda: comm.all_gather([x]))


def test_memory_in_another_order(comm: Any) -> None:
    x = np.ones((2, 4, 5, 3)).transpose(0, 3, 1, 2)  # channels last
    text = message(lambda: comm.all_reduce(x), ValueError)
    assert "pass x.transpose(0, 2, 3, 1), a view of the same memory, or numpy.ascontiguousarray(x)" in text
    comm.all_reduce(x.transpose(0, 2, 3, 1), op="prod")
    text = message(lambda: comm.all_reduce(x[:, ::2]), ValueError)
    assert "pass numpy.ascontiguousarray(x) and copy" in text


def test_torch_channels_last(comm: Any) -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    text = message(lambda: comm.all_reduce(x), ValueError)
    assert "pass x.permute(0, 2, 3, 1), a view of the same memory, or x.contiguous()" in text
    comm.all_reduce(x.permute(0, 2, 3, 1))
    assert "did you mean 'sum'" in message(lambda: comm.all_reduce(x, op=torch.distributed.ReduceOp.SUM))
    assert comm.all_reduce(torch.tensor(3.0)) == 3


def test_a_list_is_broadcast(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        def tensors() -> list[Any]:
            return [np.full((2, 3), comm.rank, "f"), np.array(comm.rank), np.full(5, comm.rank + 0.5, "f")]

        xs = tensors()
        assert comm.broadcast(xs, root=1) is xs
        assert [float(x.ravel()[0]) for x in xs] == [1, 1, 1.5]
        if comm.rank == 0:
            for x in xs:
                x.flags.writeable = False  # the root's buffers are only read
        comm.broadcast(xs)
        outs = tensors()
        assert comm.broadcast(tensors(), root=1, out=outs, async_op=True).wait() is outs
        assert [float(x.ravel()[0]) for x in outs] == [1, 1, 1.5]
        assert comm.broadcast([]) == []
        with pytest.raises(ValueError, match="`root` is 2: ranks of this group are 0 to 1"):
            comm.broadcast(xs, root=2)
        comm.barrier()

    ranks(fn, 2)


def test_torch_models_start_alike() -> None:
    torch = pytest.importorskip("torch")

    def fn(comm: Communicator) -> Any:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        with torch.no_grad():
            for x in model.state_dict().values():
                x.fill_(comm.rank + 1)
        comm.broadcast(list(model.state_dict().values()))
        return [float(x.max()) for x in model.state_dict().values()]

    assert pycomm.run_local(fn, 2) == [[1.0] * 7] * 2


NAMES = [
    ("bf16", "bfloat16"), ("BF16", "bfloat16"), ("fp32", "float32"), ("half", "float16"),
    ("float", "float32"), ("double", "float64"), ("f8e4m3", "float8_e4m3fn"), ("torch.bfloat16", "bfloat16"),
    (np.float16, "float16"), (np.dtype("f4"), "float32"), (float, "float64"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "name"), NAMES)
def test_types_as_people_type_them(comm: Any, given: Any, name: str) -> None:
    pytest.importorskip("ml_dtypes")
    assert _native.dtype_name(given) == name
    assert comm.empty(4, given).dtype.name == name
    assert f"dtype={name}," in comm.explain("all_reduce", 4, given)
    if name != "float64":
        assert repr(pycomm.Bucket([np.ones(3, "f")], dtype=given)).endswith(f"of {name}>")
    assert _native.verify("ring", "all_reduce", 2, 5, dtype=given) is None


def test_types_that_there_are_not(comm: Any) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert comm.empty(2, ml_dtypes.bfloat16).dtype == ml_dtypes.bfloat16
    assert "did you mean 'bfloat16'?" in message(lambda: comm.empty(4, "bfloat"))
    assert "dtype None is no element type: pass a name" in message(lambda: comm.empty(4, None))
    assert "is no element type: pass a name" in message(lambda: comm.empty(4, object()))


WRONG: list[tuple[str, Callable[[Any], Any]]] = [
    ("empty() needs `shape`: it takes shape, dtype, device", lambda comm: comm.empty()),
    ("`shape` is 'a': pass an integer or a sequence", lambda comm: comm.empty("a")),
    ("`shape` is 'b': pass an integer", lambda comm: comm.empty((1, "b"))),
    ("`device` is 0: pass a string", lambda comm: comm.empty(1, device=0)),
    ("empty() takes 2 positional arguments but 3 were given", lambda comm: comm.empty(1, "f", "cpu")),
    ("`color` is 'a': pass an integer", lambda comm: comm.split("a")),
    ("`timeout` is True: pass seconds", lambda comm: comm.barrier(timeout=True)),
    ("`factor` is '2': pass a number", lambda comm: pycomm.premul_sum("2")),  # type: ignore[arg-type]
    ("and the names as names=", lambda comm: pycomm.Bucket({"a": np.ones(2, np.float32)}.items())),
    ("and its keys as names=", lambda comm: pycomm.Bucket({"a": np.ones(2, np.float32)})),
    ("Bucket(tensors, comm=comm)", lambda comm: pycomm.Bucket([np.ones(2, np.float32)], comm)),
    ("`color` is 1.5: pass an integer", lambda comm: comm.split(1.5)),
    (f"`color` is {2**80}: too large", lambda comm: comm.split(2**80)),
    ("`collective` is 1: pass a string", lambda comm: comm.explain(1, 2)),
    ("explain() got `count` twice", lambda comm: comm.explain("barrier", 2, count=3)),
    (
        "explain() got an unexpected keyword argument 'algoritm' (did you mean 'algorithm'?): it takes",
        lambda comm: comm.explain("barrier", 2, algoritm="ring"),
    ),
    ("close() takes no positional arguments but 1 was given", lambda comm: comm.close(1)),
    ("`error` is 3: pass a string", lambda comm: comm.leave(3)),
    ("`rank` is None: pass an integer", lambda comm: _native.join(None, 1, "")),
    ("`timeout` is 'soon': pass a number", lambda comm: _native.join(0, 1, "", timeout="soon")),
    ("`block` is 'a': pass an integer", lambda comm: _native.Chunk("a")),
    ("Chunk() takes 4 positional arguments but 5 were given", lambda comm: _native.Chunk(1, 2, 3, 4, 5)),
    ("`write` is 3: pass a function", lambda comm: _native.add_algorithm(comm, "barrier", "a", 3)),
    ("`codec` is 'int8': pass a Codec", lambda comm: _native.encode("int8", np.ones(2, "f"))),
    ("`seed` is -1: at least 0", lambda comm: _native.Codec("int8", seed=-1)),
    ("`offsets` is 3: pass a list of integers", lambda comm: _native.Packing(np.ones(2, "f"), 3, [])),
    ("Work objects come from pycomm's calls", lambda comm: _native.Work()),
    ("World objects come from pycomm's calls", lambda comm: _native.World(2)),
    ("`other` is 3: pass a Communicator", lambda comm: _native.Communicator(3)),
    ("use pycomm.init()", lambda comm: Communicator()),
    ("`root` is 'a': pass an integer", lambda comm: comm.broadcast(np.ones(1), root="a")),
    ("`tag` is 3: pass a string", lambda comm: comm.barrier(tag=3)),
    ("(did you mean 'root'?): it takes x, out,", lambda comm: comm.broadcast(np.ones(1), src=0)),
    ("(did you mean 'async_op'?)", lambda comm: comm.all_reduce(np.ones(1), async_ops=True)),
]


@pytest.mark.parametrize(("words", "call"), WRONG, ids=[re.sub(r"\W+", "-", words) for words, _ in WRONG])
def test_wrong_arguments(comm: Any, words: str, call: Callable[[Any], Any]) -> None:
    text = message(lambda: call(comm))
    assert words in text
    assert not OF_PYBIND.search(text)


OF_PYBIND = re.compile(r"incompatible|Invoked with|SupportsInt|pybind|No constructor|Unable to cast")


def bound() -> list[Any]:
    """All functions, methods and classes of the native module."""
    found = [_native, *(each for each in vars(_native).values() if inspect.isclass(each))]
    members = [getattr(owner, name) for owner in found for name in vars(owner) if name[0] != "_"]
    kept = ("close", "abandon", "leave")  # these would end the group
    return [each for each in members if callable(each) and getattr(each, "__name__", "") not in kept]


@pytest.mark.parametrize("function", bound(), ids=lambda each: getattr(each, "__qualname__", str(each)))
def test_no_message_is_pybind11s_own(comm: Any, function: Any) -> None:
    for args in ((), (comm,), (3,), ("a", 1.5), (comm, object()), (comm, "x"), (None,) * 4, (object(),) * 30):
        for keywords in ({}, {"no_such_argument": 1}, {"x": object(), "count": -(2**90)}):
            try:
                function(*args, **keywords)
            except Exception as error:
                assert not OF_PYBIND.search(str(error)), str(error)


def test_a_misspelt_variable_is_named_once() -> None:
    code = "import pycomm; pycomm.run_local(lambda comm: comm.barrier(), 3); pycomm.init().close()"
    environment = {"PYCOMM_TIMOUT": "5", "PYCOMM_JOBS": "1", "PYCOMM_RANK": "0", "PYCOMM_SIZE": "1"}
    done = run(code, {**environment, "PYCOMM_MY_OWN": "1"})
    lines = [line for line in done.splitlines() if "WARN" in line]
    assert len(lines) == 2
    assert "PYCOMM_TIMOUT, which is not read: did you mean PYCOMM_TIMEOUT?" in done
    assert "PYCOMM_JOBS, which is not read: did you mean PYCOMM_JOB?" in done
    assert "WARN" not in run(code, {**environment, "PYCOMM_DEBUG": "0"})


def run(code: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stderr
