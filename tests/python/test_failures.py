"""Never a hang, never wrong, nothing left: how ranks learn of each other's deaths, delays and mistakes."""

import contextlib
import gc
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from processes import Gate, Rank, outcomes_of, started

import pycomm
from pycomm import Communicator, _native

Ranks = Callable[..., list[Any]]


def sockets() -> set[str]:
    """The sockets for ranks to meet that this process holds."""
    held = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            held.add(os.readlink(f"/proc/self/fd/{fd}"))
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return {line for line in lines if "@pycomm" in line and f"socket:[{line.split()[6]}]" in held}


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "pycomm" in name}


def children() -> set[str]:
    tasks = Path("/proc/self/task").iterdir()
    found: set[str] = set()
    for task in tasks:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            found |= set((task / "children").read_text().split())
    return found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = children()
    yield
    gc.collect()
    assert not sockets() and not shared_memory() and not children() - before


def work_until_told(comm: Communicator, calls: list[Callable[[int], object]]) -> tuple[str, str, float]:
    """Makes calls until one raises an error; returns its type, its text and the time."""
    try:
        for step in range(10**9):
            calls[step % len(calls)](step)
    except pycomm.CommError as error:
        return type(error).__name__, str(error), time.monotonic()
    raise AssertionError("not reached")


def busy(comm: Communicator, begins: Callable[[], None] = lambda: None) -> tuple[str, str, float]:
    """Calls collectives of many kinds, sizes and algorithms, one on symmetric memory."""
    x, big, shared = np.ones(100, np.float32), np.ones(300_000, np.float32), comm.empty(20_000)
    begins()
    names = _native.algorithms("all_reduce")
    calls: list[Callable[[int], object]] = [
        lambda step: comm.all_reduce(x, op="max", algorithm=names[step % len(names)]),
        lambda step: comm.all_reduce(big, op="max", algorithm=names[step % len(names)]),
        lambda step: comm.broadcast(big, root=step % comm.size),
        lambda step: comm.all_gather(x),
        lambda step: comm.all_reduce(shared, op="max"),
        lambda step: comm.all_reduce(x, op="max", async_op=True).wait(),
        lambda step: comm.barrier(),
    ]
    return work_until_told(comm, calls)


@pytest.mark.parametrize("seed", range(15))
def test_a_killed_rank_is_named_within_a_second(seed: int) -> None:
    choice = random.Random(seed)
    size = choice.choice([2, 3, 4])
    victim = choice.randrange(size)
    gate = Gate()

    def fn(comm: Communicator) -> object:
        return busy(comm, gate.arrive)

    with started(fn, size) as ranks:
        gate.wait_for(size)
        time.sleep(choice.random() * 0.15)
        killed = time.monotonic()
        ranks[victim].kill()
        for rank in ranks:
            if rank is ranks[victim]:
                continue
            kind, text, when = rank.outcome(10)
            assert kind == "PeerLostError", text
            assert f"rank {victim} " in text, text
            assert str(ranks[victim].pid) in text
            assert when - killed < 1
        with pytest.raises(processes.Died) as died:
            ranks[victim].outcome()
        assert died.value.args == (-signal.SIGKILL,)


@pytest.mark.parametrize("how", ["exit", "sys.exit", "exception", "close", "abort"])
def test_a_rank_that_leaves_is_named(how: str) -> None:
    def fn(comm: Communicator) -> object:
        if comm.rank != 1:
            return busy(comm)
        comm.empty(20_000)  # as in busy()
        comm.all_reduce(np.ones(100, np.float32), op="max", algorithm=_native.algorithms("all_reduce")[0])
        if how == "exit":
            os._exit(3)
        if how == "sys.exit":
            sys.exit(3)
        if how == "exception":
            raise KeyError("mine")
        if how == "abort":
            signal.signal(signal.SIGABRT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGABRT)
        comm.close()
        return None

    with started(fn, 3) as ranks:
        left, _, other = outcomes_of(ranks, 10)
    for outcome in (left, other):
        kind, text, _ = outcome
        assert kind == "PeerLostError" and "rank 1 " in text, text


def test_death_while_the_others_sleep_and_in_a_pair() -> None:
    """The others block for long: in a collective, recv, the progress thread, split and empty."""

    def fn(comm: Communicator) -> list[str]:
        groups = [comm.split(0) for _ in range(5)]
        if comm.rank == 2:
            time.sleep(0.5)
            os._exit(1)
        texts = []
        waits: list[Callable[[], object]] = [
            lambda: groups[0].barrier(),
            lambda: groups[1].recv(np.zeros(1), 2),
            lambda: groups[2].all_reduce(np.ones(9), async_op=True).wait(),
            lambda: groups[3].split(0),
            lambda: groups[4].empty(10),
        ]
        for wait in waits:
            with pytest.raises(pycomm.PeerLostError) as lost:
                wait()
            texts.append(str(lost.value))
        return texts

    with started(fn, 3) as ranks:
        began = time.monotonic()
        texts = ranks[0].outcome(10) + ranks[1].outcome(10)
        assert time.monotonic() - began < 3
    for text in texts:
        assert "rank 2 " in text, text


def test_a_clean_exit_after_the_last_call_is_no_loss() -> None:
    def fn(comm: Communicator) -> float:
        x = np.ones(50_000)
        comm.all_reduce(x)
        if comm.rank == 0:
            os.kill(os.getpid(), 0)
            return float(x[0])
        time.sleep(0.3)  # rank 0 has gone, but its finished calls still count
        return float(x[-1])

    assert processes.run(fn, 3) == [3, 3, 3]


def test_a_rank_that_never_comes() -> None:
    def alone() -> object:
        os.environ.update(PYCOMM_RANK="0", PYCOMM_SIZE="2", PYCOMM_JOB="never")
        with pytest.raises(pycomm.CommTimeoutError, match="rank 1"):
            pycomm.init(timeout=0.5)
        return True

    rank = Rank(alone, [])
    try:
        assert rank.outcome(10)
    finally:
        os.close(rank.pipe)


def test_a_stopped_rank_is_named_at_the_deadline() -> None:
    gate = Gate()

    def fn(comm: Communicator) -> object:
        comm.barrier()
        gate.arrive()
        x = np.ones(200_000)
        return work_until_told(comm, [lambda step: comm.all_reduce(x, op="max", timeout=0.5)])

    with started(fn, 3) as ranks:
        gate.wait_for(3)
        time.sleep(0.2)
        ranks[2].kill(signal.SIGSTOP)
        stopped = time.monotonic()
        for rank in ranks[:2]:
            kind, text, when = rank.outcome(10)
            assert kind in ("CommTimeoutError", "AbortedError"), text
            assert "for rank 2," in text and "0.5" in text, text
            assert 0.4 < when - stopped < 3
        ranks[2].kill(signal.SIGCONT)
        kind, text, _ = ranks[2].outcome(10)
        assert kind in ("CommTimeoutError", "AbortedError"), text


def test_time_in_which_all_were_stopped_does_not_count() -> None:
    """A job that was suspended, or whose machine slept, continues."""
    gate, late = Gate(), Gate()

    def fn(comm: Communicator) -> None:
        comm.barrier()
        gate.arrive()
        if comm.rank == 1:
            late.wait_for(1)
        comm.barrier(timeout=2)

    with started(fn, 2) as ranks:
        gate.wait_for(2)
        time.sleep(0.2)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in ranks:
                rank.kill(number)
            time.sleep(3 if number == signal.SIGSTOP else 0.2)
        late.arrive()
        for rank in ranks:
            rank.outcome(10)


def test_interrupt_while_waiting() -> None:
    gate = Gate()

    def fn(comm: Communicator) -> object:
        comm.barrier()
        if comm.rank == 2:
            time.sleep(1)
        try:
            gate.arrive()
            comm.barrier()
        except BaseException as error:
            return type(error).__name__, str(error)
        return None

    with started(fn, 3) as ranks:
        gate.wait_for(2)
        time.sleep(0.2)
        ranks[0].kill(signal.SIGINT)
        outcomes = outcomes_of(ranks, 10)
    assert outcomes[0][0] == "KeyboardInterrupt"
    for kind, text in outcomes[1:]:
        assert kind == "AbortedError", (kind, text)
        assert "rank 0 was interrupted" in text


@pytest.mark.parametrize("wait", ["wait", "timed wait", "recv", "init", "lock"])
def test_interrupt_of_other_waits(wait: str) -> None:
    gate = Gate()

    def fn(comm: Communicator) -> object:
        try:
            if comm.rank == 1:
                time.sleep(30)
            gate.arrive()
            if wait == "wait":
                comm.all_reduce(np.ones(1), async_op=True).wait()
            elif wait == "timed wait":
                comm.all_reduce(np.ones(1), async_op=True).wait(30)
            elif wait == "recv":
                comm.recv(np.ones(1), 1)
            elif wait == "init":
                os.environ["PYCOMM_JOB"] = "another"
                pycomm.init()
            else:
                comm.all_reduce(np.ones(1), async_op=True)
                comm.barrier()
        except KeyboardInterrupt:
            os._exit(77)  # at once, since closing waits for queued calls
        return None

    with started(fn, 2) as ranks:
        gate.wait_for(1)
        time.sleep(0.2)
        began = time.monotonic()
        ranks[0].kill(signal.SIGINT)
        with pytest.raises(processes.Died) as died:
            ranks[0].outcome(10)
        assert died.value.args == (77,)
        assert time.monotonic() - began < 2


MISMATCHES: dict[str, tuple[Callable[[Communicator], object], Callable[[Communicator], object], str]] = {
    "collective": (
        lambda c: c.all_reduce(np.ones(4)),
        lambda c: c.broadcast(np.ones(4)),
        "all_reduce.*broadcast",
    ),
    "barrier": (lambda c: c.all_reduce(np.ones(4)), lambda c: c.barrier(), "all_reduce.*barrier"),
    "count": (lambda c: c.all_reduce(np.ones(4)), lambda c: c.all_reduce(np.ones(5)), "count=4.*count=5"),
    "zero": (lambda c: c.all_reduce(np.ones(4)), lambda c: c.all_reduce(np.ones(0)), "count=4.*count=0"),
    "large": (
        lambda c: c.all_reduce(np.ones(400_000)),
        lambda c: c.all_reduce(np.ones(400_001)),
        "count=400000.*count=400001",
    ),
    "dtype": (lambda c: c.all_reduce(np.ones(4)), lambda c: c.all_reduce(np.ones(4, int)), "float64.*int64"),
    "size alike": (
        lambda c: c.all_reduce(np.ones(4)),
        lambda c: c.all_reduce(np.ones(8, "f")),
        "float64.*float32",
    ),
    "op": (lambda c: c.all_reduce(np.ones(4)), lambda c: c.all_reduce(np.ones(4), op="max"), "sum.*max"),
    "root": (lambda c: c.broadcast(np.ones(4)), lambda c: c.broadcast(np.ones(4), root=1), "root=0.*root=1"),
    "algorithm": (
        lambda c: c.all_reduce(np.ones(4), algorithm="ring"),
        lambda c: c.all_reduce(np.ones(4), algorithm="tree"),
        "ring.*tree",
    ),
    "tag": (
        lambda c: c.all_reduce(np.ones(4), tag="layer3"),
        lambda c: c.all_reduce(np.ones(4), tag="layer4"),
        "layer3.*layer4",
    ),
    "premul": (
        lambda c: c.all_reduce(np.ones(4), op=pycomm.premul_sum(0.5)),
        lambda c: c.all_reduce(np.ones(4), op=pycomm.premul_sum(0.25)),
        "",
    ),
    "counts": (
        lambda c: c.all_gather(np.ones(2), counts=[2, 2, 2]),
        lambda c: c.all_gather(np.ones(2), counts=[2, 2, 2][::-1] if c.rank != 1 else [3, 2, 2]),
        "",
    ),
    "equal and uneven": (
        lambda c: c.all_to_all(np.ones(6)),
        lambda c: c.all_to_all(np.ones(6), send_counts=[2, 2, 2], recv_counts=[2, 2, 2]),
        "with counts",
    ),
    "out of order": (
        lambda c: [c.all_reduce(np.ones(4), tag=tag) for tag in "ab"],
        lambda c: [c.all_reduce(np.ones(4), tag=tag) for tag in "ba"],
        '"a".*"b"|a.*b',
    ),
    "split": (lambda c: c.split(0), lambda c: c.empty(4), r"split().*empty()"),
}


@pytest.mark.links
@pytest.mark.parametrize("what", MISMATCHES)
def test_mismatches_name_ranks_and_values(ranks: Ranks, what: str) -> None:
    one, two, match = MISMATCHES[what]

    def fn(comm: Communicator) -> tuple[str, str]:
        with pytest.raises(pycomm.CommError) as caught:
            comm.all_reduce(np.ones(7))  # a rank may still be in this call when others find the difference
            (two if comm.rank == 1 else one)(comm)
            comm.barrier()
        with pytest.raises(pycomm.AbortedError):
            comm.barrier()
        return type(caught.value).__name__, str(caught.value)

    for kind, text in ranks(fn, 3):
        assert kind == "MismatchError", text
        assert "rank 1 " in text and re.search("rank [02] ", text), text
        words = match.split(".*") if "|" not in match else []
        assert all(word in text for word in words), text


def test_calls_queued_before_a_failure_raise_it() -> None:
    gate = Gate()

    def fn(comm: Communicator) -> list[str]:
        comm.barrier()
        if comm.rank == 1:
            gate.wait_for(1)
            os._exit(0)
        works = [comm.all_reduce(np.ones(3), async_op=True) for _ in range(10)]
        gate.arrive()
        kinds = []
        for i in (9, 0, 5):
            with pytest.raises(pycomm.CommError) as caught:
                works[i].wait()
            kinds.append(type(caught.value).__name__)
        return kinds

    with started(fn, 2) as ranks:
        assert ranks[0].outcome(10) == ["PeerLostError"] * 3


def test_a_call_inside_a_call() -> None:
    """A signal handler runs during a call: its own call is refused, and the outer call is abandoned."""
    gate = Gate()

    def fn(comm: Communicator) -> str:
        if comm.rank == 1:
            time.sleep(3)
            return ""
        texts = []

        def handler(*_: object) -> None:
            try:
                comm.barrier()
            except pycomm.CommError as error:
                texts.append(str(error))
            raise InterruptedError

        signal.signal(signal.SIGUSR1, handler)
        gate.arrive()
        with pytest.raises(InterruptedError):
            comm.recv(np.empty(4), 1)
        return texts[0]

    with started(fn, 2) as ranks:
        gate.wait_for(1)
        time.sleep(0.2)
        ranks[0].kill(signal.SIGUSR1)
        assert "set a flag" in ranks[0].outcome(10)


def test_interrupt_while_closing() -> None:
    gate = Gate()

    def fn(comm: Communicator) -> str:
        if comm.rank == 1:
            time.sleep(30)
        work = comm.recv(np.empty(4), 1, async_op=True)
        gate.arrive()
        with pytest.raises(KeyboardInterrupt):
            comm.close()
        with pytest.raises(pycomm.AbortedError):
            work.wait()
        return "closed"

    with started(fn, 2) as ranks:
        gate.wait_for(1)
        time.sleep(0.2)
        ranks[0].kill(signal.SIGINT)
        assert ranks[0].outcome(10) == "closed"


@pytest.mark.links
def test_one_call_more_than_the_others(ranks: Ranks) -> None:
    """A root that waits for nobody, and a rank that leaves without the call: the later one gets the error."""

    def fn(comm: Communicator) -> str:
        comm.barrier()
        if comm.rank == 0:
            comm.broadcast(np.ones(3))
        try:
            comm.close()
        except pycomm.MismatchError as error:
            return str(error)
        return ""

    texts = ranks(fn, 2)
    assert any("rank 0 called broadcast" in text and "rank 1 closed" in text for text in texts), texts


@pytest.mark.links
def test_a_last_call_in_which_nobody_waits(ranks: Ranks) -> None:
    """Two roots: neither waits for the other, so the later one gets the error when it closes."""

    def fn(comm: Communicator) -> str:
        comm.all_reduce(np.ones(3))
        comm.broadcast(np.ones(3), root=comm.rank)
        try:
            comm.close()
        except pycomm.MismatchError as error:
            return str(error)
        return ""

    texts = ranks(fn, 2)
    assert any("root=0" in text and "root=1" in text for text in texts), texts


@pytest.mark.links
@pytest.mark.parametrize(("send", "recv"), [(3, 1), (1, 3), (0, 2), (2, 0), (5000, 300_000)])
def test_uneven_counts_that_disagree(ranks: Ranks, send: int, recv: int) -> None:
    """Only two ranks know the counts between them."""

    def fn(comm: Communicator) -> str:
        me = comm.rank
        sends = [[1, 2, 1], [1, 1, send], [2, 1, 1]][me]
        recvs = [[1, 1, 2], [2, 1, 1], [1, recv, 1]][me]
        with pytest.raises(pycomm.MismatchError) as caught:
            comm.all_to_all(np.ones((sum(sends), 2)), send_counts=sends, recv_counts=recvs)
            comm.barrier()
        return str(caught.value)

    for text in ranks(fn, 3):
        assert f"rank 1 sends {2 * send} elements to rank 2, which expects {2 * recv}" in text
        assert "send_counts" in text and "all_to_all" in text


@pytest.mark.links
def test_a_child_of_fork(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = comm.empty(100)
        op, work = comm.all_reduce_init(np.ones(4)), comm.all_reduce(np.ones(4), async_op=True)
        work.wait()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            texts = []
            uses: list[Callable[[], object]] = [
                lambda: comm.all_reduce(np.ones(4)),
                lambda: comm.barrier(async_op=True),
                lambda: comm.empty(4),
                lambda: comm.split(0),
                lambda: comm.send(np.ones(1), 1 - comm.rank),
                op,
            ]
            for use in uses:
                try:
                    use()
                    texts.append("no error")
                except BaseException as error:
                    texts.append(f"{type(error).__name__}: {error}")
            with contextlib.suppress(BaseException):
                comm.close()
            os.write(write, "\n".join(texts).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as file:
            texts = file.read().splitlines()
        assert os.waitpid(pid, 0)[1] == 0
        assert len(texts) == 6
        for text in texts:
            assert text.startswith("CommError: ") and "fork" in text and "pycomm.init" in text, text
        x[:] = 1  # the parent's group stays usable
        assert (comm.all_reduce(x) == comm.size).all()
        assert (op() == comm.size).all()

    ranks(fn, 2)


def test_a_child_that_ends_takes_nothing_along() -> None:
    """multiprocessing's workers end through exit handlers and destructors."""

    def fn(comm: Communicator) -> float:
        comm.all_reduce(np.ones(4), async_op=True).wait()
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join(10)
        assert child.exitcode == 0
        return float(comm.all_reduce(np.ones(4))[0])

    assert processes.run(fn, 2) == [2, 2]


def test_a_worker_that_outlives_its_rank_hides_nothing() -> None:
    read, write = os.pipe()

    def fn(comm: Communicator) -> object:
        comm.barrier()
        if comm.rank == 1:
            if os.fork() == 0:  # a data loader's worker
                os.write(write, str(os.getpid()).encode())
                time.sleep(60)
                os._exit(0)
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        return work_until_told(comm, [lambda step: comm.barrier()])

    with started(fn, 2) as ranks:
        worker = int(os.read(read, 100))
        try:
            began = time.monotonic()
            kind, text, _ = ranks[0].outcome(10)
            assert kind == "PeerLostError" and "rank 1 " in text
            assert time.monotonic() - began < 2
        finally:
            os.kill(worker, signal.SIGKILL)
            os.close(read)
            os.close(write)


@pytest.mark.links
def test_use_after_close(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = comm.empty(10)
        op = comm.all_reduce_init(x)
        comm.barrier()
        comm.close()
        comm.close()
        uses: list[Callable[[], object]] = [
            op,
            lambda: comm.all_reduce(x),
            lambda: comm.all_reduce(x, async_op=True),
            lambda: comm.all_reduce_init(x),
            lambda: comm.empty(3),
            lambda: comm.split(0),
            lambda: comm.send(x, 1 - comm.rank),
            lambda: comm.all_gather_object(1),
        ]
        for use in uses:
            with pytest.raises(pycomm.AbortedError, match=f"rank {comm.rank} has closed"):
                use()
        assert (comm.rank, comm.size) == (comm.rank, 2)

    ranks(fn, 2)


def test_groups_leave_no_descriptors() -> None:
    def fn(comm: Communicator) -> None:
        x = comm.empty(1 << 16)
        comm.split(0).all_reduce(x)

    pycomm.run_local(fn, 3)
    gc.collect()
    before = descriptors()
    for _ in range(5):
        pycomm.run_local(fn, 3)
    gc.collect()
    assert descriptors() <= before


def test_processes_leave_no_descriptors_and_no_threads() -> None:
    def fn(comm: Communicator) -> None:
        counts = []
        for _ in range(3):
            with pycomm.init() as other:
                other.all_reduce(other.empty(1000), async_op=True).wait()
                other.send(np.ones(1), 1) if other.rank == 0 else other.recv(np.ones(1), 0)
            del other
            gc.collect()
            counts.append((descriptors(), len(os.listdir("/proc/self/task"))))
        assert counts[1] == counts[2], counts

    processes.run(fn, 2)


def test_the_first_line_of_a_traceback_is_enough(tmp_path: Path) -> None:
    """Under the launcher the job ends, and its output says which rank was lost."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, numpy as np, pycomm\n"
        "comm = pycomm.init()\n"
        "for step in range(100000):\n"
        "    if comm.rank == 1 and step == 50: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    comm.all_reduce(np.ones(1000))\n"
    )
    command = [sys.executable, "-m", "pycomm", "run", "-n", "3", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    assert "rank 1" in done.stderr


@pytest.mark.slow
def test_more_elements_than_fit_32_bits(ranks: Ranks) -> None:
    count = 2**31 + 17
    available = int(re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) << 10
    if available < 16 << 30:
        pytest.skip("needs 16 GiB of free memory")

    def fn(comm: Communicator) -> None:
        x = np.empty(count, np.int8)
        x[:] = comm.rank + 1
        x[-17:] = np.arange(17) + comm.rank
        comm.all_reduce(x)
        assert x[-17:].tolist() == [2 * i + 1 for i in range(17)]
        assert (x[: count - 17 : 1 << 16] == 3).all() and x[2**31 - 1] == 3

    ranks(fn, 2)
