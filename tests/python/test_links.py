"""Rank threads on made-up nodes, with messages between them: algorithms, codecs, and errors by name."""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import processes
import pytest

import pycomm
from pycomm import Communicator, _native
from pycomm.codecs.kinds import DEFAULTS

WORLDS: dict[str, list[int]] = {
    "2 x 2": [0, 0, 1, 1],
    "dealt": [0, 1, 0, 1],
    "3 x 1": [0, 1, 2],
    "4 x 1": [0, 1, 2, 3],
    "3 and 1": [0, 0, 1, 0],
}
worlds = pytest.mark.parametrize("nodes", WORLDS.values(), ids=WORLDS)
COUNTS = [1, 5, 1009, 300_001]


def algorithms(collective: str) -> list[str]:
    return _native.algorithms(collective)


def test_ranks_know_their_node() -> None:
    def fn(comm: Communicator) -> tuple[int, int, int]:
        return comm.local_rank, comm.local_size, comm.num_nodes

    assert pycomm.run_local(fn, 4, nodes=2) == [(0, 2, 2), (1, 2, 2), (0, 2, 2), (1, 2, 2)]
    assert pycomm.run_local(fn, 5, nodes=2) == [(0, 3, 2), (1, 3, 2), (2, 3, 2), (0, 2, 2), (1, 2, 2)]
    assert pycomm.run_local(fn, 3, nodes=[7, 2, 7]) == [(0, 2, 2), (0, 1, 2), (1, 2, 2)]
    assert pycomm.run_local(fn, 2) == [(0, 2, 1), (1, 2, 1)]


def test_groups_that_are_split_off_have_nodes_of_their_own() -> None:
    def fn(comm: Communicator) -> tuple[int, int]:
        by_node = comm.split(comm.rank // 2)
        across = comm.split(comm.rank % 2)
        assert by_node and across
        assert by_node.all_reduce(np.array([comm.rank]))[0] == 4 * (comm.rank // 2) + 1
        assert across.all_reduce(np.array([comm.rank]))[0] == 2 * (comm.rank % 2) + 2
        return by_node.num_nodes, across.num_nodes

    assert pycomm.run_local(fn, 4, nodes=2, delays=0) == [(1, 2)] * 4


@pytest.mark.parametrize(
    ("nodes", "match"), [(0, "nodes=0"), (4, "1 to 3 nodes"), ([0, 1], "names 2 nodes for 3")]
)
def test_nodes_that_make_no_sense(nodes: int | Sequence[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pycomm.run_local(lambda comm: None, 3, nodes=nodes)


@pytest.mark.parametrize("nodes", [2.0, "001", None, {0, 1, 2}, [0, 1, 1.0], iter([0, 0, 1])])
def test_nodes_that_are_no_numbers(nodes: Any) -> None:
    with pytest.raises(TypeError, match="`nodes` is .*pass how many nodes"):
        pycomm.run_local(lambda comm: None, 3, nodes=nodes)


@pytest.mark.parametrize("nodes", [np.int64(2), [2**70, 2**70, -1], np.array([5, 5, 1]), (True, True, False)])
def test_nodes_by_other_numbers(nodes: Any) -> None:
    assert pycomm.run_local(lambda comm: comm.local_size, 3, nodes=nodes) == [2, 2, 1]


@worlds
def test_every_algorithm(nodes: list[int]) -> None:
    n = len(nodes)

    def fn(comm: Communicator) -> None:
        me = comm.rank
        for count in COUNTS:
            x = np.arange(count) + me
            total = n * np.arange(count) + n * (n - 1) // 2
            for name in algorithms("all_reduce"):
                assert np.array_equal(comm.all_reduce(x.copy(), algorithm=name), total), (name, count)
            for name in algorithms("reduce"):
                found = comm.reduce(x, root=n - 1, out=np.zeros_like(x), algorithm=name)
                assert me != n - 1 or np.array_equal(found, total), (name, count)
            for name in algorithms("broadcast"):
                assert np.array_equal(comm.broadcast(x.copy(), root=1, algorithm=name), np.arange(count) + 1)
            for name in algorithms("all_gather"):
                found = comm.all_gather(x, algorithm=name).reshape(n, -1)
                assert all(np.array_equal(found[r], np.arange(count) + r) for r in range(n)), (name, count)
            blocks = np.concatenate([x + 10 * r for r in range(n)])
            for name in algorithms("reduce_scatter"):
                found = comm.reduce_scatter(blocks, algorithm=name)
                assert np.array_equal(found, total + 10 * n * me), (name, count)
            for name in algorithms("all_to_all"):
                found = comm.all_to_all(blocks, algorithm=name).reshape(n, -1)
                assert all(np.array_equal(found[r], np.arange(count) + r + 10 * me) for r in range(n)), name
                in_place = blocks.copy()
                comm.all_to_all(in_place, out=in_place, algorithm=name)
                assert np.array_equal(in_place, found.ravel()), (name, count)
            gathered = comm.gather(x, root=0)
            assert me != 0 or np.array_equal(gathered.reshape(n, -1)[n - 1], np.arange(count) + n - 1)
            part = comm.scatter(blocks if me == 0 else None, root=0, out=np.empty_like(x))
            assert np.array_equal(part, np.arange(count) + 10 * me)
        sends = [r + me for r in range(n)]
        uneven = np.concatenate([np.full(s, me) for s in sends])
        comes = [me + r for r in range(n)]
        found = comm.all_to_all(uneven, send_counts=sends, recv_counts=comes)
        assert np.array_equal(found, np.repeat(np.arange(n), comes))
        comm.barrier()

    for delays in (None, 1):
        pycomm.run_local(fn, n, nodes=nodes, delays=delays, timeout=60)


@worlds
def test_every_codec_gives_the_bits_of_one_node(nodes: list[int]) -> None:
    n = len(nodes)

    def fn(comm: Communicator) -> list[bytes]:
        found = []
        for count in (3, 1030, 70_001):
            x = np.random.default_rng(comm.rank).normal(size=count).astype("f")
            for codec in DEFAULTS:
                for _ in range(2):  # some codecs keep residuals under a name
                    found.append(comm.all_reduce(x.copy(), codec=codec, tag=f"{codec} {count}").tobytes())
            for codec in ("int8", "fp8_e4m3"):
                found.append(comm.all_gather(x, codec=codec, step=3).tobytes())
                found.append(comm.reduce_scatter(np.tile(x, n), codec=codec, step=3).tobytes())
        return found

    assert pycomm.run_local(fn, n, nodes=nodes, delays=2) == pycomm.run_local(fn, n)


@worlds
def test_error_feedback_owes_what_results_lack(nodes: list[int]) -> None:
    """Results of some steps, and what all ranks still owe then, are the exact sum."""
    n, count, steps = len(nodes), 6 * 1024 * len(nodes), 4
    every = [np.random.default_rng(r).normal(size=count).astype("f") for r in range(n)]
    exact = steps * np.sum(every, axis=0, dtype=np.float64)

    def fn(comm: Communicator) -> None:
        x, share = every[comm.rank], slice(count // n * comm.rank, count // n * (comm.rank + 1))
        calls: list[tuple[str, slice, Callable[..., Any]]] = []
        for name in ("two_shot", "hierarchical"):
            calls.append((name, slice(None), lambda **how: comm.all_reduce(x.copy(), **how)))
        for name in ("direct", "hierarchical"):
            calls.append((name, share, lambda **how: comm.reduce_scatter(x, **how)))
        for name, part, call in calls:
            feedback = pycomm.codecs.ErrorFeedback()
            codec = pycomm.codecs.Int4(error_feedback=feedback)
            got = sum(call(codec=codec, algorithm=name, tag="x").astype("d") for _ in range(steps))
            owed = comm.all_reduce(feedback.state_dict()["x"].astype("d"))
            assert np.abs(owed).max() > 0.1
            assert np.allclose(got + owed[part], exact[part], atol=1e-4), name

    pycomm.run_local(fn, n, nodes=nodes)


def test_delays_do_not_change_the_bits() -> None:
    def fn(comm: Communicator) -> bytes:
        x = np.random.default_rng(comm.rank).normal(size=100_000).astype("f")
        return comm.all_reduce(x, algorithm="ring").tobytes()

    assert len({found for seed in range(5) for found in pycomm.run_local(fn, 4, nodes=4, delays=seed)}) == 1


@worlds
def test_a_rank_that_raises_is_named(nodes: list[int]) -> None:
    errors: dict[int, str] = {}

    def fn(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.all_reduce(np.ones(10))
            raise KeyError("mine")
        try:
            comm.all_reduce(np.ones(10))
            comm.all_reduce(np.ones(100_000))
            comm.barrier()
        except pycomm.PeerLostError as error:
            errors[comm.rank] = str(error)
            raise

    with pytest.raises(KeyError, match="mine"):
        pycomm.run_local(fn, len(nodes), nodes=nodes, delays=3)
    assert set(errors) == set(range(len(nodes))) - {1}
    assert all("rank 1 " in error and "all_reduce" in error for error in errors.values()), errors


@worlds
def test_a_rank_that_stalls_is_named(nodes: list[int]) -> None:
    def fn(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank == 2:
            time.sleep(1)
        with pytest.raises(pycomm.CommError, match="rank 2, which has not called it"):
            comm.all_reduce(np.ones(100_000), timeout=0.3)

    pycomm.run_local(fn, len(nodes), nodes=nodes, delays=4)


@worlds
def test_a_rank_that_differs_is_named(nodes: list[int]) -> None:
    def fn(comm: Communicator) -> None:
        named = "rank 0 .*count=4.*rank 1 .*count=5|rank 1 .*count=5.*rank"
        with pytest.raises(pycomm.MismatchError, match=named):
            comm.barrier()
            comm.all_reduce(np.ones(5 if comm.rank == 1 else 4))
            comm.barrier()

    pycomm.run_local(fn, len(nodes), nodes=nodes, delays=5)


def test_a_child_can_drop_its_parents_groups() -> None:
    """The thread that delivers late messages exists only in the parent."""
    kept: list[Communicator] = []

    def fn(comm: Communicator) -> None:
        comm.all_reduce(np.ones(1000))
        kept.append(comm)

    pycomm.run_local(fn, 2, nodes=2, delays=1)

    def child() -> bool:
        kept.clear()
        return gc.collect() >= 0

    rank = processes.Rank(child, [])
    try:
        assert rank.outcome(20)
    finally:
        rank.kill()
        rank.wait()


def test_messages_between_nodes() -> None:
    def fn(comm: Communicator) -> None:
        n, me = comm.size, comm.rank
        for count in (1, 1000, 400_000):
            out = np.empty(count, int)
            comm.send_recv(np.full(count, me), (me + 1) % n, out, (me - 1) % n)
            assert (out == (me - 1) % n).all()
            for _ in range(5):  # a short message is gone before it is received
                if count > 1000:
                    break
                comm.send(np.full(count, me), (me + 1) % n)
                comm.recv(out, (me - 1) % n)
                assert (out == (me - 1) % n).all()

    for nodes in (2, 4):
        pycomm.run_local(fn, 4, nodes=nodes, delays=6)


def test_explain_tells_of_messages() -> None:
    def fn(comm: Communicator) -> str:
        return comm.explain("all_reduce", 1000, "float32")

    text = pycomm.run_local(fn, 2, nodes=2)[0]
    assert "send to rank 1, channel" in text and "receive from rank 1, channel" in text
