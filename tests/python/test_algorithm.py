"""Algorithms written in Python: those of docs/algorithms.md, and the messages for wrong ones."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import pycomm
from pycomm import _native
from pycomm.algorithm import Algorithm, Builder, Chunk, Ref, World

DOCS = Path(__file__).parents[2] / "docs" / "algorithms.md"
HALVES = (Chunk(0, 0, 1, 2), Chunk(0, 1, 2, 2))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)


def write_chain(b: Builder, world: World) -> None:
    """A reduce to rank 0: partial sums of each half pass down from the last rank."""
    last = world.size - 1

    def shown(rank: int, half: Chunk) -> Ref:
        return b.in_(half, rank=rank) if rank == last else b.scratch(half, rank=rank)

    for half in HALVES:
        srcs = [b.in_(half)] + ([shown(b.rank + 1, half)] if b.rank < last else [])
        if b.rank == 0:
            b.combine([b.out(half)], srcs, final=True)
        elif b.rank < last:
            b.combine([b.scratch(half)], srcs)
        if b.rank > 0:
            b.offer(b.rank - 1, shown(b.rank, half))
    for half in HALVES:
        if b.rank > 0:
            b.accept(b.rank - 1, shown(b.rank, half))


def write_ring(b: Builder, world: World) -> None:
    """An all_gather that passes blocks to the right, one at a time."""
    n, left, right = world.size, (b.rank - 1) % world.size, (b.rank + 1) % world.size
    b.copy(b.out(Chunk(b.rank)), b.in_(Chunk(b.rank)))
    given = [Chunk((b.rank - step) % n) for step in range(n)]
    for step in range(1, n):
        b.offer(right, b.out(given[step - 1]))
        b.copy(b.out(given[step]), b.out(given[step], rank=left))
    for chunk in given[:-1]:
        b.accept(right, b.out(chunk))


def write_star(b: Builder, world: World) -> None:
    ranks = range(world.size)
    if b.rank == 0:
        b.combine([b.out(rank=r) for r in ranks], [b.in_(rank=r) for r in ranks], final=True)
        return
    for ref in (b.in_(), b.out()):
        b.offer(0, ref)
    for ref in (b.in_(), b.out()):
        b.accept(0, ref)


def test_the_example_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks("python")[0], {})
    assert eval(capsys.readouterr().out, {"np": np}) == [10.0] * 4


def test_the_mistake_of_the_docs_and_its_counterexample() -> None:
    with pytest.raises(ValueError) as error:
        exec(blocks("python")[1], {"pycomm": pycomm})
    assert str(error.value) == " ".join(blocks("text")[0].split())


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_runs_by_object_and_by_name_and_in_groups_that_were_split_off(ranks: int) -> None:
    chain = Algorithm("chain", "reduce", write_chain)
    chain.verify(sizes=[ranks], roots=[0])
    ring = Algorithm("my_ring", "all_gather", write_ring)
    ring.verify(sizes=[ranks])

    def use(comm: pycomm.Communicator) -> None:
        total = np.zeros(1001)
        comm.reduce(np.full(1001, 2.0**comm.rank), out=total, algorithm=chain)
        assert comm.rank != 0 or (total == 2**ranks - 1).all()
        mine, everybody = np.full(77, comm.rank), np.arange(ranks).repeat(77)
        assert (comm.all_gather(mine, algorithm="my_ring") == everybody).all()
        assert (comm.split(0).all_gather(mine, algorithm=ring) == everybody).all()

    pycomm.run_local(use, ranks)


def test_a_communicator_learns_of_algorithms_that_are_younger() -> None:
    def use(comm: pycomm.Communicator) -> float:
        with pytest.raises(ValueError, match="late_star"):
            comm.all_reduce(np.ones(10), algorithm="late_star")
        comm.barrier()
        if comm.rank == 0:
            Algorithm("late_star", "all_reduce", write_star)
        comm.barrier()
        return float(comm.all_reduce(np.ones(10), algorithm="late_star")[0])

    assert pycomm.run_local(use, 3) == [3, 3, 3]


def test_the_second_of_a_name_takes_the_place_of_the_first() -> None:
    def never(b: Builder, world: World) -> None:
        raise ZeroDivisionError("the first")

    Algorithm("again", "all_reduce", never)
    Algorithm("again", "all_reduce", write_star)
    assert pycomm.run_local(lambda comm: comm.all_reduce(np.ones(3), algorithm="again")[0], 2) == [2, 2]


def test_names_of_the_library_are_taken() -> None:
    with pytest.raises(ValueError, match=r"'ring'.*choose another"):
        Algorithm("ring", "all_reduce", write_star)
    with pytest.raises(ValueError, match="all_reduce, "):  # says which collectives there are
        Algorithm("star", "allreduce", write_star)


def test_an_error_in_write_is_the_callers() -> None:
    def broken(b: Builder, world: World) -> None:
        raise ZeroDivisionError("no such world")

    algorithm = Algorithm("broken", "all_reduce", broken)
    with pytest.raises(ZeroDivisionError, match="no such world"):
        algorithm.verify()
    with pytest.raises(ZeroDivisionError, match="no such world"):
        pycomm.run_local(lambda comm: comm.all_reduce(np.ones(3), algorithm=algorithm), 2)


def test_a_wrong_plan_never_runs() -> None:
    def twice(b: Builder, world: World) -> None:  # counts rank 0 twice
        if b.rank == 0:
            ranks = range(world.size)
            b.combine([b.out(rank=r) for r in ranks], [b.in_(), *(b.in_(rank=r) for r in ranks)], final=True)
        else:
            write_star(b, world)

    algorithm = Algorithm("twice", "all_reduce", twice)
    with pytest.raises(ValueError, match=r"it sums rank 0 twice$"):
        algorithm.verify(sizes=[2], counts=[1])

    def use(comm: pycomm.Communicator) -> float:
        x = np.ones(10)
        words = r'algorithm "twice" is wrong: all_reduce of 10 float64 \(sum\) on 2 ranks, in place: '
        with pytest.raises(ValueError, match=words):
            comm.all_reduce(x, algorithm=algorithm)
        assert (x == 1).all()
        return float(comm.all_reduce(x)[0])  # the group is still usable

    assert pycomm.run_local(use, 2) == [2, 2]


def test_steps_that_are_no_schedule() -> None:
    def one_sided(b: Builder, world: World) -> None:  # offers a chunk that nobody uses
        if b.rank == 1:
            b.offer(0, b.in_())
        b.copy(b.out(), b.in_())

    with pytest.raises(ValueError, match=r"on 2 ranks.*rank 1, step 0"):
        Algorithm("one_sided", "all_reduce", one_sided).verify(sizes=[2])

    def stranger(b: Builder, world: World) -> None:
        b.accept(99, b.in_())

    with pytest.raises(ValueError, match="rank 0, step 0: accepts in@0 .* from rank 99 more often than it"):
        Algorithm("stranger", "all_reduce", stranger).verify(sizes=[2])

    def others_block(b: Builder, world: World) -> None:
        b.copy(b.out(), b.in_())

    with pytest.raises(ValueError, match="rank 1, step 0: rank 1's .*no block 0 .*, but block 1 alone"):
        Algorithm("others_block", "all_gather", others_block).verify(sizes=[2])


def test_two_algorithms_of_one_name_do_not_meet() -> None:
    def write_other_star(b: Builder, world: World) -> None:  # as correct as the other, in another order
        if b.rank == 0:
            write_star(b, world)
            return
        for ref in (b.out(), b.in_()):
            b.offer(0, ref)
        for ref in (b.out(), b.in_()):
            b.accept(0, ref)

    Algorithm("my_star", "all_reduce", write_other_star).verify(sizes=[2])

    def use(comm: pycomm.Communicator) -> None:
        comm.barrier()
        _native.add_algorithm(comm, "all_reduce", "my_star", [write_star, write_other_star][comm.rank])
        with pytest.raises(pycomm.MismatchError, match="my_star"):
            comm.all_reduce(np.ones(3), algorithm="my_star")

    pycomm.run_local(use, 2)


def test_other_threads_call_while_an_algorithm_writes() -> None:
    writing, called = threading.Event(), threading.Event()

    def slow(b: Builder, world: World) -> None:
        writing.set()
        assert called.wait(20)
        b.copy(b.out(), b.in_())

    algorithm = Algorithm("slow", "broadcast", slow)

    def use(comm: pycomm.Communicator) -> None:
        with ThreadPoolExecutor(1) as other:
            broadcast = other.submit(lambda: comm.broadcast(np.ones(3), algorithm=algorithm))
            assert writing.wait(20)
            comm.all_reduce(np.ones(3))
            called.set()
            broadcast.result()

    pycomm.run_local(use, 1)
