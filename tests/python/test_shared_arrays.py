"""NumPy's arrays in shared memory: where they lie, calls on them, children of fork(), errors, the end."""

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest

import pycomm
from pycomm import Communicator
from pycomm._native import is_shared_array, makes_shared_arrays

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import shared_arrays

Ranks = Callable[..., list[Any]]
LARGE = 64 << 10  # bytes
KEPT = 512 << 20  # of freed blocks, at most


def is_shared(array: Any) -> bool:
    return is_shared_array(array)


# ---- where arrays lie ----


def test_large_arrays_inside_are_shared() -> None:
    for make in (np.empty, np.zeros, np.ones):
        with pycomm.shared_arrays():
            assert is_shared(make(LARGE, np.uint8))
            assert is_shared(make((64, 1024), np.float32))
            assert not is_shared(make(LARGE - 1, np.uint8))
            assert not is_shared(make(0))
        assert not is_shared(make(LARGE, np.uint8))


def test_zeros_are_zero_wherever_they_lie() -> None:
    with pycomm.shared_arrays():
        for size in (LARGE, 100_001, 3 << 20):
            for _ in range(3):
                assert not np.zeros(size, np.uint8).any()
                x = np.empty(size, np.uint8)
                x[:] = 255
                del x


def test_results_and_copies_are_shared_too() -> None:
    plain = np.arange(20_000.0)
    with pycomm.shared_arrays():
        assert is_shared(plain + 1) and is_shared(plain.copy()) and is_shared(plain.astype("f"))
        assert (plain + 1)[-1] == 20_000
    assert not is_shared(plain)


def test_the_block_nests_and_ends_as_it_began() -> None:
    assert not makes_shared_arrays()
    with pycomm.shared_arrays():
        with pycomm.shared_arrays():
            assert makes_shared_arrays()
        assert makes_shared_arrays()
        with pytest.raises(KeyError), pycomm.shared_arrays():
            raise KeyError
        assert makes_shared_arrays()
    assert not makes_shared_arrays()


def test_it_decorates_with_and_without_parentheses() -> None:
    @pycomm.shared_arrays()
    def make(size: int) -> Any:
        return np.empty(size)

    @pycomm.shared_arrays
    def make_too(size: int) -> Any:
        return np.empty(size)

    for fn in make, make_too:
        assert is_shared(fn(LARGE)) and is_shared(fn(LARGE))
    assert make_too.__name__ == "make_too"
    assert not is_shared(np.empty(LARGE))


def test_it_decorates_nothing_that_runs_later() -> None:
    async def waits() -> None: ...

    def generates() -> Iterator[int]:
        yield 1

    for later in waits, generates:
        for decorate in (pycomm.shared_arrays, pycomm.shared_arrays()):
            with pytest.raises(TypeError, match=f"{later.__name__}.*with pycomm.shared_arrays"):
                decorate(later)
    for wrong in (5, True):
        with pytest.raises(TypeError, match=rf"shared_arrays\({wrong}\)"):
            pycomm.shared_arrays(wrong)  # type: ignore[call-overload]


def test_other_threads_enter_it_themselves() -> None:
    found = []

    def make() -> None:
        found.append(is_shared(np.empty(LARGE)))
        with pycomm.shared_arrays():
            found.append(is_shared(np.empty(LARGE)))

    with pycomm.shared_arrays():
        # A context of its own, as threads have until Python lets them inherit one.
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
    assert found[1] and (not found[0] or getattr(sys.flags, "thread_inherit_context", False))


def test_rank_threads_enter_it_with_their_caller() -> None:
    def fn(comm: Communicator) -> bool:
        return is_shared(np.empty(LARGE))

    assert pycomm.run_local(fn, 2) == [False, False]
    with pycomm.shared_arrays():
        assert pycomm.run_local(fn, 2) == [True, True]


def test_arrays_grow_and_shrink() -> None:
    """In place or not, across the least size or not, inside or afterwards."""
    sizes = [10, 9_000, 100, 20_000, 8_192, 300_000, 8_191, 299_999, 10]
    for inside in (True, False):
        with pycomm.shared_arrays():
            arrays = [np.arange(size) for size in sizes]
        with pycomm.shared_arrays() if inside else contextlib.nullcontext():
            for x in arrays:
                for size in sizes:
                    kept = min(size, x.size)
                    want = x[:kept].copy()
                    x.resize(size, refcheck=False)
                    assert np.array_equal(x[:kept], want) and not x[kept:].any()
                    x[kept:] = np.arange(size - kept)


def test_arrays_may_be_freed_by_any_thread_and_after_the_block() -> None:
    with pycomm.shared_arrays():
        arrays = [np.full(50_000, i) for i in range(200)]
    turns = [arrays[i::4] for i in range(4)]
    del arrays

    def drop(mine: list[Any]) -> None:
        while mine:
            x = mine.pop()
            assert (x == x[0]).all()

    threads = [threading.Thread(target=drop, args=(mine,)) for mine in turns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_arrays_outlive_the_interpreters_end() -> None:
    script = (
        "import sys, numpy as np, pycomm\n"
        "with pycomm.shared_arrays():\n"
        "    kept = np.zeros(1 << 20)\n"
        "    sys.kept = kept, kept[5:]\n"
        "class AtTheEnd:\n"
        "    def __del__(self, array=kept): array[:] = 1\n"
        "sys.last = AtTheEnd()\n"
        "comm = pycomm.init(); comm.all_reduce(kept); comm.close()\n"
        "comm = pycomm.init(); comm.all_reduce(kept)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- calls ----


def use_again(comm: Communicator, call: Callable[[], None]) -> None:
    """Ranks ask each other from the second call on after the first on shared arrays."""
    for _ in range(4):
        call()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_collective(ranks: Ranks, size: int) -> None:
    def fn(comm: Communicator) -> None:
        me, n, rows = comm.rank, comm.size, 20_011
        with pycomm.shared_arrays():
            pads = [np.empty(LARGE * (1 + 3 * me % 2), np.uint8)]  # another place on each rank
            part, whole = np.empty(rows, np.float32), np.empty(n * rows, np.float32)
            other = np.empty(n * rows, np.float32)
        numbers = np.arange(n * rows, dtype=np.float32) % 11

        def all_calls() -> None:
            part[:] = np.arange(rows) % 7 + me
            comm.all_reduce(part)
            want = n * (np.arange(rows) % 7) + n * (n - 1) / 2
            assert np.array_equal(part, want)
            comm.all_reduce(part, op="max", out=other[:rows])
            assert np.array_equal(other[:rows], want)
            part[:] = numbers[me * rows : (me + 1) * rows]
            assert np.array_equal(comm.all_gather(part, out=whole), numbers)
            whole[:] = -1
            whole[me * rows : (me + 1) * rows] = part
            comm.all_gather(whole[me * rows : (me + 1) * rows], out=whole)
            assert np.array_equal(whole, numbers)
            for out in (part, other[:rows], whole[me * rows : (me + 1) * rows]):
                whole[:] = numbers
                comm.reduce_scatter(whole, out=out)
                assert np.array_equal(out, n * numbers[me * rows : (me + 1) * rows])
            whole[:] = np.repeat(np.arange(n) * 10 + me, rows)
            comm.all_to_all(whole, out=other)
            want = np.repeat(np.arange(n) + 10 * me, rows)
            assert np.array_equal(other, want)
            comm.all_to_all(whole, out=whole)
            assert np.array_equal(whole, want)
            for root in range(n):
                part[:] = me + 1
                comm.broadcast(part, root=root)
                assert (part == root + 1).all()
                part[:] = me + 1
                comm.reduce(part, root=root)
                assert (part == (n * (n + 1) / 2 if me == root else me + 1)).all()

        use_again(comm, all_calls)
        del pads

    ranks(fn, size)


def test_views_slices_and_results(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        with pycomm.shared_arrays():
            x = np.empty((40, 4_000), np.float32)
        for view in (x, x.reshape(-1), x[3:35], x.view(np.int32), x.ravel()[5:100_001], x[1:].reshape(-1)):

            def call(view: Any = view) -> None:
                view[...] = comm.rank + 1
                assert (comm.all_reduce(view) == 3).all()

            use_again(comm, call)
        with pytest.raises(ValueError, match="contiguous"):
            comm.all_reduce(x[:, 1])
        with pycomm.shared_arrays():
            gathered = comm.all_gather(x.reshape(-1))
        assert is_shared(gathered) and gathered.size == 2 * x.size

    ranks(fn, 2)


def test_every_way_to_call(ranks: Ranks) -> None:
    """Blocking, asynchronous, bound once, several in a list; with a tag, in order."""

    def fn(comm: Communicator) -> None:
        with pycomm.shared_arrays():
            arrays = [np.empty(n, np.float32) for n in (20_000, 50_000, 17)]
        bound = comm.all_reduce_init(arrays[1], tag="bound")

        def call() -> None:
            for x in arrays:
                x[:] = comm.rank + 1
            works = [comm.all_reduce(x, async_op=True, tag=str(x.size)) for x in arrays]
            for work in works:
                work.wait(30)
            bound()
            assert (arrays[0] == 3).all() and (arrays[1] == 6).all() and (arrays[2] == 3).all()
            comm.all_reduce(arrays)
            assert (arrays[0] == 6).all() and (arrays[1] == 12).all() and (arrays[2] == 6).all()
            comm.all_reduce(arrays[0], algorithm="ring")
            comm.all_reduce(arrays[0], deterministic=True)
            assert (arrays[0] == 24).all()

        use_again(comm, call)

    ranks(fn, 2)


def test_with_other_buffers(ranks: Ranks) -> None:
    """What only some ranks, or one side of a call, have in shared arrays; and symmetric memory."""

    def fn(comm: Communicator) -> None:
        n = 30_000
        with pycomm.shared_arrays():
            shared = [np.empty(n) for _ in range(2)]
        plain, symmetric = np.empty(n), comm.empty(n, float)
        sides = [*shared, plain, symmetric]

        def call() -> None:
            for i, x in enumerate(sides):
                for out in sides[i:]:
                    x[:] = comm.rank + 1
                    comm.barrier()  # the others may still read a symmetric or shared one
                    assert (comm.all_reduce(x, out=out) == 6).all()
                    comm.barrier()
            for rank in range(comm.size):
                mine = shared[0] if comm.rank == rank else plain
                mine[:] = comm.rank + 1
                assert (comm.all_reduce(mine) == 6).all()

        use_again(comm, call)
        half = comm.split(comm.rank // 2)
        assert half is not None

        def in_part() -> None:
            shared[1][:] = 1
            assert (half.all_reduce(shared[1]) == half.size).all()

        use_again(half, in_part)
        half.close()

    ranks(fn, 3)


def test_made_up_nodes_and_codecs_take_them_as_any() -> None:
    def fn(comm: Communicator) -> None:
        x = np.empty(100_000, np.float32)
        assert is_shared(x)
        for codec in (None, "bf16"):
            for _ in range(4):
                x[:] = comm.rank + 1
                assert (comm.all_reduce(x, codec=codec) == 10).all()

    with pycomm.shared_arrays():
        pycomm.run_local(fn, 4, nodes=2)
        pycomm.run_local(fn, 4)


def test_torch_tensors_of_shared_arrays(ranks: Ranks) -> None:
    torch = pytest.importorskip("torch")

    def fn(comm: Communicator) -> None:
        with pycomm.shared_arrays():
            x = np.empty(50_000, np.float32)
            assert not is_shared(torch.empty(50_000).numpy())  # torch's own memory
        tensor = torch.from_numpy(x)
        del x
        gc.collect()

        def call() -> None:
            tensor.fill_(comm.rank + 1)
            comm.all_reduce(tensor)
            assert (tensor == 3).all()

        use_again(comm, call)

    ranks(fn, 2)


def test_many_arrays_under_calls_take_no_more(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        taken = []
        with pycomm.shared_arrays():
            for i in range(3000):
                x = np.full(LARGE // 4 + i % 50_000, comm.rank + 1.0, np.float32)
                size = np.array([x.size])
                comm.all_reduce(x[: LARGE // 4 + 1000 * (i % 2)] if x.size > LARGE // 2 else x)
                assert x[0] == 3
                del x, size
                if i % 1000 == 999:
                    comm.barrier()
                    taken.append(processes.shared_bytes())
                    comm.barrier()
        assert taken[-1] <= taken[0] + (1 << 20), taken

    ranks(fn, 2)


def test_where_there_is_no_room_arrays_are_plain_and_the_log_says_so_once() -> None:
    script = (
        "import resource, numpy as np, pycomm\n"
        "from pycomm._native import is_shared_array\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20),) * 2)\n"
        "with pycomm.shared_arrays():\n"
        "    arrays = [np.zeros(1 << 17) for _ in range(5)]\n"
        "print([is_shared_array(x) for x in arrays])\n"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[False, False, False, False, False]\n"
    assert done.stderr.count("no shared memory for an array") == 1


# ---- children of fork() ----


def in_child(body: Callable[[], Any]) -> Any:
    child = processes.Rank(body, [])
    try:
        return child.outcome()
    finally:
        os.close(child.pipe)


def child_uses(x: Any) -> bool:
    assert (x[:1000] == 7).all() and not x[1000:].any()
    x[:] = 9
    x.resize(x.size * 2, refcheck=False)
    assert (x[: x.size // 2] == 9).all()
    fresh = [np.zeros(LARGE) for _ in range(10)]
    return any(is_shared(y) for y in fresh) or is_shared(x)


@pytest.mark.parametrize("inside", [True, False])
def test_a_childs_writes_are_its_own(inside: bool) -> None:
    with pycomm.shared_arrays():
        x = np.zeros(200_000)
        x[:1000] = 7
        if inside:
            assert not in_child(lambda: child_uses(x))
    assert not in_child(lambda: child_uses(x))
    assert (x[:1000] == 7).all() and not x[1000:].any()


def test_fork_from_a_thread_while_others_allocate() -> None:
    with pycomm.shared_arrays():
        x = np.zeros(100_000)
    x[:1000] = 7
    stop = threading.Event()

    def allocate() -> None:
        with pycomm.shared_arrays():
            while not stop.is_set():
                np.empty(LARGE)

    busy = threading.Thread(target=allocate)
    busy.start()
    outcomes: list[Any] = []
    forks = threading.Thread(
        target=lambda: outcomes.extend(in_child(lambda: child_uses(x)) for _ in range(10))
    )
    forks.start()
    forks.join()
    stop.set()
    busy.join()
    assert outcomes == [False] * 10


def _sum_of_shared(part: int) -> float:
    data = _DATA["x"]
    data[part::4] += 1
    return float(data[part::4].sum())


_DATA: dict[str, Any] = {}


def test_workers_of_multiprocessing(ranks: Ranks) -> None:
    """As data loaders do it: workers read what their parent made, while it makes calls."""

    def fn(comm: Communicator) -> None:
        with pycomm.shared_arrays():
            mine = np.ones(400_000)
            _DATA["x"] = np.ones(400_000)
            with multiprocessing.get_context("fork").Pool(2) as pool:
                for _ in range(3):
                    results = pool.map_async(_sum_of_shared, range(4), chunksize=1)
                    comm.all_reduce(mine, op="avg")
                    results.get(30)
            assert (_DATA["x"] == 1).all() and (mine == 1).all()

    if ranks is processes.run:
        ranks(fn, 2)
    else:
        pycomm.run_local(fn, 1)


def test_a_child_may_have_a_group_of_its_own() -> None:
    """Its arrays of before are plain to it, and new ones are shared."""
    with pycomm.shared_arrays():
        old = np.full(100_000, 5.0)

        def fn(comm: Communicator) -> float:
            new = np.full(100_000, comm.rank + 1.0)
            assert is_shared(new) and not is_shared(old)
            for _ in range(4):
                comm.all_reduce(new, op="max")
                comm.all_reduce(old, op="max")
            old[:] = comm.rank
            comm.barrier()
            assert (old == comm.rank).all()
            return float(new[-1])

        assert processes.run(fn, 2) == [2, 2]
    assert (old == 5).all()


# ---- errors ----


def test_a_late_peer_writes_into_no_new_array() -> None:
    """It was stopped in the middle of a call, and goes on when the others have long given up."""

    def fn(comm: Communicator) -> None:
        size = 16 << 20
        with pycomm.shared_arrays():
            x = np.ones(size, np.float32)
            for _ in range(4):
                comm.all_reduce(x, op="max")
            comm.barrier()
            pids = comm.all_gather(np.array([os.getpid()]))
            if comm.rank == 1:
                for _ in range(10_000):
                    comm.all_reduce(x, op="max")
                return
            stopped = False
            with pytest.raises(pycomm.CommTimeoutError, match="rank 1"):
                for i in range(10_000):
                    if i == 3:
                        timer = threading.Timer(0.01, os.kill, (int(pids[1]), signal.SIGSTOP))
                        timer.start()
                        stopped = True
                    comm.all_reduce(x, op="max", timeout=1)
            assert stopped
            del x
            new = [np.full(size, 3, np.float32) for _ in range(3)]
            os.kill(int(pids[1]), signal.SIGCONT)
            time.sleep(0.5)
            for array in new:
                assert (array == 3).all()

    with processes.started(fn, 2) as ranks:
        outcomes = processes.outcomes_of(ranks)
    assert outcomes[0] is None, outcomes
    assert isinstance(outcomes[1], pycomm.CommTimeoutError), outcomes


def test_a_rank_killed_meanwhile_is_named_and_nothing_is_held() -> None:
    def fn(comm: Communicator) -> int:
        with pycomm.shared_arrays():
            for i in range(100_000):
                x = np.full(LARGE + i % 1000, comm.rank + 1.0, np.float32)
                if comm.rank == 1 and i == 300:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    comm.all_reduce(x)
                except pycomm.PeerLostError as error:
                    assert "rank 1" in str(error)
                    break
            before = processes.shared_bytes()
            for _ in range(300):
                x = np.full(LARGE, 1.0, np.float32)
            return processes.shared_bytes() - before

    with processes.started(fn, 3) as ranks:
        outcomes = processes.outcomes_of(ranks)
    assert isinstance(outcomes[1], processes.Died)
    assert all(outcomes[rank] <= 2 << 20 for rank in (0, 2)), outcomes


@pytest.mark.parametrize(
    ("measure", "others"),  # others: what else may grow, for resident memory the plans of 1000 sizes
    [(processes.shared_bytes, 0), (shared_arrays.resident, 8 << 20)],
    ids=["shared", "resident"],
)
def test_a_rank_killed_under_calls_and_the_others_go_on(measure: Callable[[], int], others: int) -> None:
    """bench/shared_arrays.py with fewer arrays."""
    count = 3000

    def fn(comm: Communicator) -> shared_arrays.Report:
        return shared_arrays.under_calls(comm, count, measure)

    with processes.started(fn, 3) as ranks:
        outcomes = processes.outcomes_of(ranks)
    assert isinstance(outcomes[1], processes.Died) and outcomes[1].args == (-signal.SIGKILL,)
    # When an array is made, two others are there at most: the one before, and the one of the call that
    # failed. Between these lie three gaps at most, and memory is added only where none of them is large
    # enough: so all are no larger than six of the largest arrays, in whole huge pages.
    largest, huge = 4 * shared_arrays.MOST, 2 << 20
    budget = 3 * -(-6 * largest // huge) * huge + others
    assert budget < count * 4 * shared_arrays.LEAST / 10
    for rank in (0, 2):
        report = outcomes[rank]
        assert report.lost.startswith("PeerLostError: rank 1 (pid "), report
        assert 0 <= report.lost_at - count // 2 <= count // 10  # the signal may take a while
        assert len(report.held) == 10 and max(report.held) <= report.before + budget, report
