"""How a rank leaves: on an error, in a child of fork, from a handler, at the end of Python."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Gate, started

import pycomm
from pycomm import Communicator

Ranks = Callable[..., list[Any]]

PENDING = {
    "a collective": lambda comm: comm.all_reduce(np.ones(10), async_op=True),
    "a long one": lambda comm: comm.all_reduce(np.ones(1_000_000), async_op=True),
    "a message": lambda comm: comm.recv(np.ones(10), 1, async_op=True),
    "many": lambda comm: [comm.all_reduce(np.ones(i), async_op=True) for i in range(50)],
    "none": lambda comm: None,
}

METHODS = {
    "before empty()": lambda comm: comm.empty(4),
    "before split()": lambda comm: comm.split(0),
    'tagged "broadcast_object"': lambda comm: comm.broadcast_object(1),
    'tagged "all_gather_object"': lambda comm: comm.all_gather_object(1),
}


@pytest.mark.parametrize("what", PENDING)
def test_an_error_is_not_kept_waiting(what: str, ranks: Ranks) -> None:
    """Calls in progress do not delay it; the others learn of it, whatever they wait for."""

    def fn(comm: Communicator) -> str:
        if comm.rank == 0:
            with pytest.raises(RuntimeError, match="boom"), comm:
                PENDING[what](comm)
                raise RuntimeError("boom")
            return ""
        with pytest.raises(pycomm.PeerLostError) as caught:
            comm.recv(np.empty(3), src=0)
        return str(caught.value)

    before = time.monotonic()
    text = ranks(fn, 2, timeout=60)[1]
    assert time.monotonic() - before < 10
    assert "rank 0" in text and "RuntimeError: boom" in text, text


@pytest.mark.parametrize("words", ["no data", "no data in \udcff\0"])
def test_an_error_is_quoted_to_whoever_waits(words: str, ranks: Ranks) -> None:
    def fn(comm: Communicator) -> str:
        if comm.rank == 0:
            with pytest.raises(RuntimeError, match="no data"), comm:
                raise RuntimeError(words)
            return ""
        with pytest.raises(pycomm.PeerLostError) as caught:
            comm.all_reduce(np.ones(4))
        return str(caught.value)

    text = ranks(fn, 2, timeout=60)[1]
    assert text.startswith("rank 0 left the group because of an error before all_reduce(count=4"), text
    assert "had called: RuntimeError: no data" in text


@pytest.mark.parametrize("words", METHODS)
def test_an_error_names_the_method_that_was_called(words: str, ranks: Ranks) -> None:
    """These methods wait in collectives that the user has not called."""

    def fn(comm: Communicator) -> str:
        if comm.rank == 0:
            comm.close()
            return ""
        with pytest.raises(pycomm.PeerLostError) as caught:
            METHODS[words](comm)
        return str(caught.value)

    text = ranks(fn, 2, timeout=60)[1]
    assert text.startswith("rank 0 closed its communicator before ")
    assert text.endswith(f"{words}, which rank 1 had called."), text


def test_an_error_in_a_rank_thread_with_calls_under_way() -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.all_reduce(np.ones(10), async_op=True)
            raise RuntimeError("boom")
        comm.recv(np.empty(3), src=0)

    before = time.monotonic()
    with pytest.raises(RuntimeError, match="boom"):
        pycomm.run_local(fn, 2, timeout=60)
    assert time.monotonic() - before < 10


def test_an_error_that_nobody_catches(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy as np, pycomm\n"
        "comm = pycomm.init(timeout=60)\n"
        "if comm.rank == 0:\n"
        "    comm.all_reduce(np.ones(10), async_op=True)\n"
        "    raise RuntimeError('boom')\n"
        "comm.recv(np.empty(3), src=0)\n"
    )
    before = time.monotonic()
    command = [sys.executable, "-m", "pycomm", "run", "-n", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - before < 10
    assert done.returncode == 1
    assert "PeerLostError: rank 0 left the group with calls under way" in done.stderr
    assert "because of an error: RuntimeError: boom" in done.stderr


def test_an_error_of_close_is_run_locals() -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.broadcast(np.ones(3))  # a root waits for nobody

    with pytest.raises(pycomm.MismatchError, match="rank 0 called broadcast"):
        pycomm.run_local(fn, 2)


def test_close_inside_a_call() -> None:
    """In a handler, while its own thread drives the queue: waiting for the queue would never end."""
    gate = Gate()

    def fn(comm: Communicator) -> str:
        if comm.rank == 1:
            gate.wait_for(1)
            time.sleep(0.6)
            comm.send(np.ones(4), 0)
            return ""
        texts = []

        def handler(*_: object) -> None:
            try:
                comm.close()
            except pycomm.CommError as error:
                texts.append(str(error))

        signal.signal(signal.SIGUSR1, handler)
        work = comm.recv(np.empty(4), 1, async_op=True)
        gate.arrive()
        assert work.wait()[0] == 1
        return texts[0]

    with started(fn, 2) as ranks:
        time.sleep(0.3)
        ranks[0].kill(signal.SIGUSR1)
        assert "set a flag" in ranks[0].outcome(20)


def in_child(body: Callable[[], str]) -> str:
    """The result of a function in a child of fork()."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            os.write(write, body().encode())
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        text = file.read().decode()
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"the child ended with status {status}"
    return text


@pytest.mark.parametrize("count", [3, 1_000_000])
def test_a_child_reads_symmetric_memory(count: int, ranks: Ranks) -> None:
    """Several arrays, also in a grandchild, whose writes are private."""

    def fn(comm: Communicator) -> None:
        x, others = comm.empty(count), [comm.empty(5, "int8")]
        x[:], others[0][:] = 7 + comm.rank, 3

        def child() -> str:
            grandchild = in_child(lambda: f"{x[-1]:g}")
            x[0] = 100
            return f"{x[0]:g} {x[-1]:g} {others[0].sum()} {grandchild}"

        assert in_child(child) == f"100 {7 + comm.rank} 15 {7 + comm.rank}"
        assert x[0] == 7 + comm.rank
        assert comm.all_reduce(x)[-1] == sum(7 + rank for rank in range(comm.size))
        others.clear()
        assert in_child(lambda: f"{x[0]:g}") == f"{x[0]:g}"

    ranks(fn, 2)


def test_a_child_waits_for_nothing() -> None:
    gate = Gate()

    def fn(comm: Communicator) -> None:
        if comm.rank == 1:
            gate.wait_for(1)
            comm.send(np.ones(3), 0)
            return
        work = comm.recv(np.empty(3), 1, async_op=True)
        for wait in (work.wait, work.result, lambda: work.wait(timeout=5)):
            text = in_child(lambda wait=wait: str(wait()))
            assert text.startswith("CommError: ") and "pycomm.init" in text
        gate.arrive()
        done = work.wait()
        assert in_child(lambda: str(work.wait().sum())) == "3.0"  # completed work may be asked for its result
        assert (done == 1).all()

    with started(fn, 2) as job:
        for rank in job:
            rank.outcome(30)


EXITS = {
    "pending calls": "works = [comm.all_reduce(np.ones(20000), async_op=True) for _ in range(2000)]",
    "a thread in a call": "receive = lambda: comm.recv(np.empty(4), 1 - comm.rank)\n"
    "threading.Thread(target=receive, daemon=True).start()\n"
    "time.sleep(0.2)",
    "a thread that waits": "work = comm.recv(np.empty(4), 1 - comm.rank, async_op=True)\n"
    "threading.Thread(target=work.wait, daemon=True).start()\n"
    "time.sleep(0.2)\n"
    "comm.send(np.empty(4), 1 - comm.rank)",
    "threads in an exporter": "class Exporter:\n"
    "    x = np.ones(4)\n"
    "    def __dlpack__(self, **keywords):\n"
    "        for _ in range(20000):\n"
    "            pass\n"
    "        return self.x.__dlpack__(**keywords)\n"
    "    def __dlpack_device__(self):\n"
    "        return self.x.__dlpack_device__()\n"
    "def read():\n"
    "    while True:\n"
    "        pycomm._native.describe_buffer(Exporter(), 'x')\n"
    "for _ in range(4):\n"
    "    threading.Thread(target=read, daemon=True).start()\n"
    "time.sleep(0.2)",
    "threads that pack": "def pack():\n"
    "    bucket = pycomm.Bucket([np.ones(1 << 16, np.float32)])\n"
    "    while True:\n"
    "        bucket.pack()\n"
    "for _ in range(8):\n"
    "    threading.Thread(target=pack, daemon=True).start()\n"
    "time.sleep(0.2)",
}


@pytest.mark.parametrize("what", EXITS)
def test_exit_in_the_middle(what: str, tmp_path: Path) -> None:
    """The interpreter ends while calls are in progress: no crash, no hang."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import threading, time, numpy as np, pycomm\ncomm = pycomm.init(timeout=20)\n{EXITS[what]}\n"
    )
    for command in (
        [sys.executable, "-m", "pycomm", "run", "-n", "2", str(script)],
        [sys.executable, str(script)],
    ):
        if len(command) == 2 and what.startswith("a thread"):  # alone, it would have no peer
            continue
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
