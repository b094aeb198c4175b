import re
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

import pycomm
from pycomm import _native


class Store:
    """A minimal store for the threads of one process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            assert key not in self._values
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, 30)
            return self._values[key]


def test_run_local_gives_results_in_rank_order() -> None:
    def fn(comm: pycomm.Communicator) -> tuple[int, int, float]:
        x = np.full(5, comm.rank + 1.0)
        comm.all_reduce(x)
        return comm.rank, comm.size, float(x[4])

    assert pycomm.run_local(fn, 3) == [(0, 3, 6.0), (1, 3, 6.0), (2, 3, 6.0)]


def test_run_local_raises_the_cause() -> None:
    seen: list[BaseException] = []

    def fn(comm: pycomm.Communicator) -> None:
        if comm.rank == 1:
            raise KeyError("the cause")
        try:
            comm.barrier()
        except pycomm.CommError as error:
            seen.append(error)
            raise

    with pytest.raises(KeyError, match="the cause"):
        pycomm.run_local(fn, 3)
    assert len(seen) == 2
    assert any(isinstance(error, pycomm.PeerLostError) for error in seen)


def test_run_local_needs_a_rank() -> None:
    with pytest.raises(ValueError, match="n=0"):
        pycomm.run_local(lambda comm: None, 0)


OBJECT = {"text": "\u00e9", "numbers": [1, -(2**80), 0.5], "raw": b"\0\xff", "none": None, "yes": True}


@pytest.mark.parametrize("root", [0, 2])
def test_broadcast_object(root: int) -> None:
    def fn(comm: pycomm.Communicator) -> object:
        return comm.broadcast_object(OBJECT if comm.rank == root else None, root=root)

    assert pycomm.run_local(fn, 3) == [OBJECT] * 3


def test_all_gather_object() -> None:
    def fn(comm: pycomm.Communicator) -> object:
        return comm.all_gather_object([comm.rank] * comm.rank)

    assert pycomm.run_local(fn, 4) == [[[], [1], [2, 2], [3, 3, 3]]] * 4


def test_an_object_that_cannot_be_sent_leaves_the_group_usable() -> None:
    def fn(comm: pycomm.Communicator) -> object:
        expected = TypeError if comm.rank == 1 else ValueError
        with pytest.raises(expected, match="obj is of type" if comm.rank == 1 else "rank 1"):
            comm.all_gather_object((1, 2) if comm.rank == 1 else 5)
        with pytest.raises(expected):
            comm.broadcast_object({1, 2}, root=1)
        return comm.all_gather_object(comm.rank)

    assert pycomm.run_local(fn, 3) == [[0, 1, 2]] * 3


def test_a_communicator_closes_with_its_block() -> None:
    def fn(comm: pycomm.Communicator) -> None:
        assert repr(comm) == f"<pycomm.Communicator rank {comm.rank} of 2>"
        with comm:
            comm.barrier()
        with pytest.raises(pycomm.AbortedError):
            comm.barrier()

    pycomm.run_local(fn, 2)


def test_split_gives_a_full_communicator() -> None:
    def fn(comm: pycomm.Communicator) -> object:
        with comm.split(comm.rank % 2) as half:
            return half.all_gather_object(comm.rank)

    assert pycomm.run_local(fn, 4) == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_a_negative_color_gives_no_group() -> None:
    def fn(comm: pycomm.Communicator) -> object:
        group = comm.split(-1 if comm.rank == 1 else 0)
        return group and group.all_gather_object(comm.rank)

    assert pycomm.run_local(fn, 3) == [[0, 2], None, [0, 2]]


@pytest.mark.parametrize("given", [{"rank": 0}, {"size": 2}, {"rank": 0, "size": 2}, {"store": Store()}])
def test_init_takes_all_or_nothing(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="all three"):
        pycomm.init(**given)


def test_init_with_a_rank_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="rank=2 does not fit size=2"):
        pycomm.init(store=Store(), rank=2, size=2)


def test_each_init_with_a_store_meets_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[str] = []

    def join(rank: int, size: int, address: str, timeout: float | None) -> pycomm.Communicator:
        addresses.append(address)
        raise pycomm.CommError("not today")

    monkeypatch.setattr(_native, "join", join)
    store = Store()
    for _ in range(2):
        with pytest.raises(pycomm.CommError):
            pycomm.init(store=store, rank=0, size=2)
    assert addresses[0] != addresses[1]
    assert store.get("pycomm/0").decode() == addresses[0]
    assert store.get("pycomm/1").decode() == addresses[1]


def test_init_alone() -> None:
    with pycomm.init() as comm:
        assert (comm.rank, comm.size) == (0, 1)
        assert comm.all_gather_object("alone") == ["alone"]


def test_premul_sum_holds_its_factor() -> None:
    assert pycomm.premul_sum(0.5).factor == 0.5
    assert pycomm.premul_sum(0.5) == pycomm.premul_sum(0.5)


def test_ranks_before_the_function() -> None:
    with pytest.raises(TypeError, match=r"`fn` is 2: .*run_local\(fn, 2\)"):
        pycomm.run_local(2, print)  # type: ignore[arg-type]


SUBINTERPRETER = """
import _xxsubinterpreters as interpreters  # of another name since Python 3.13
import sys
interpreters.run_string(interpreters.create(), f"import sys; sys.path[:0] = {sys.path}; import pycomm")
"""


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="_xxsubinterpreters is the name until Python 3.12")
def test_a_subinterpreter_is_told_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUBINTERPRETER], stderr=subprocess.PIPE, text=True, timeout=30
    )
    assert (
        done.returncode == 1
        and "ImportError" in done.stderr
        and "only in the main interpreter" in done.stderr
    )


@pytest.mark.parametrize("n", [2.0, "2", None])
def test_the_number_of_rank_threads_is_an_integer(n: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(f"`n` is {n!r}: pass an integer")):
        pycomm.run_local(lambda comm: comm.rank, n)
