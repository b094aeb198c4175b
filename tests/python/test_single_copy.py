"""Large all_gathers and all_to_alls, whose inputs peers read in place if they can: the same bits as through
windows."""

import hashlib
import mmap
import os
import random
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
MIB = 1 << 20


def empty(count: int, dtype: type = np.uint8) -> np.ndarray:
    """Memory in huge pages: recycled memory is often in small pages, which are sent through windows."""
    memory = mmap.mmap(-1, count * np.dtype(dtype).itemsize + 2 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype, count)


def pattern(rank: int, count: int, salt: int = 0) -> np.ndarray:
    return (np.arange(count, dtype=np.int64) * (2 * rank + 3) + salt).astype(np.uint8)


def gathered(counts: list[int], salt: int = 0) -> np.ndarray:
    return np.concatenate([pattern(rank, count, salt) for rank, count in enumerate(counts)])


# Equal, odd and very unequal counts, and ranks without elements.
@pytest.mark.parametrize(
    "counts",
    [[8 * MIB] * 2, [8 * MIB + 1, 4 * MIB - 3], [9 * MIB + 7, 0], [0, 5, 12 * MIB + 1], [4 * MIB] * 3],
)
def test_blocks_of_all_sizes(ranks: Ranks, counts: list[int]) -> None:
    def fn(comm: Communicator) -> None:
        mine, total = counts[comm.rank], sum(counts)
        before = sum(counts[: comm.rank])
        for salt, shift in enumerate([0, 1, 4095]):  # not aligned to anything
            x = empty(mine + shift)[shift:]
            out = empty(total + shift)[shift:]
            x[:] = pattern(comm.rank, mine, salt)
            comm.all_gather(x, out=out, counts=counts)
            x[:] = 255  # at once, since nobody reads it any more
            assert (out == gathered(counts, salt)).all()
            out[:] = 0
            slot = out[before : before + mine]
            slot[:] = pattern(comm.rank, mine, salt)
            comm.all_gather(slot, out=out, counts=counts)
            slot[:] ^= 255
            slot[:] ^= 255
            assert (out == gathered(counts, salt)).all()

    ranks(fn, len(counts))


@pytest.mark.parametrize("shifts", [(0, 16), (16, 0), (4, 67), (1, 64)])
def test_input_and_output_at_any_distance(ranks: Ranks, shifts: tuple[int, int]) -> None:
    """If the kernel would copy slowly, windows are used instead: on all ranks or on none."""

    def fn(comm: Communicator) -> None:
        shift_in, shift_out = shifts if comm.rank else (0, 0)  # only some ranks' addresses are slow ones
        x = empty(4 * MIB + shift_in)[shift_in:]
        out = empty(comm.size * 4 * MIB + shift_out)[shift_out:]
        for salt in range(3):
            x[:] = pattern(comm.rank, x.size, salt)
            comm.all_gather(x, out=out)
            assert (out == gathered([x.size] * comm.size, salt)).all()

    ranks(fn, 3)


def test_all_to_all_where_some_ranks_call_in_place(ranks: Ranks) -> None:
    """A call in place overwrites the input that others would read: then all ranks use windows."""

    def fn(comm: Communicator) -> None:
        block = 3 * MIB + 5
        x, out = empty(block * comm.size), empty(block * comm.size)
        assert "instead" in comm.explain("all_to_all", x.size, "uint8")
        for salt in range(6):
            in_place = comm.rank < salt % (comm.size + 1)
            for peer in range(comm.size):
                x[peer * block : (peer + 1) * block] = pattern(comm.rank, block, salt + 5 * peer)
            result = comm.all_to_all(x, out=x if in_place else out)
            if not in_place:
                x[:] = 255  # at once, since nobody reads it any more
            for peer in range(comm.size):
                received = result[peer * block : (peer + 1) * block]
                assert (received == pattern(peer, block, salt + 5 * comm.rank)).all()

    ranks(fn, 3)


def test_an_input_belongs_to_its_caller_after_the_call(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = empty(3 * MIB, np.int32)
        out = empty(3 * MIB * comm.size, np.int32)
        for step in range(30):
            x.fill(100 * step + comm.rank)
            if step % 3 == comm.rank:
                time.sleep(0.002)  # the others take turns to be late
            comm.all_gather(x, out=out)
            x.fill(-1)
            rows = out.reshape(comm.size, -1)
            assert [(row == 100 * step + r).all() for r, row in enumerate(rows)] == [True] * comm.size

    ranks(fn, 3)


def test_among_other_calls(ranks: Ranks) -> None:
    """Large and small calls of all kinds, in groups and pairs, queued or not; all ranks draw the same."""

    def fn(comm: Communicator) -> None:
        choice = random.Random(5)
        half = comm.split(comm.rank % 2)
        assert half is not None
        x, out = empty(3 * MIB, np.int32), empty(3 * MIB * comm.size, np.int32)
        x.fill(comm.rank)
        small = np.ones(100, np.float32)
        for _ in range(60):
            kind = choice.randrange(7)
            if kind == 0:
                comm.all_gather(x, out=out)
                assert (out.reshape(comm.size, -1)[:, ::4097] == np.arange(comm.size)[:, None]).all()
            elif kind == 1:
                group = half.all_gather(x, out=out[: x.size * half.size])
                assert (group.reshape(half.size, -1)[:, -1] % 2 == comm.rank % 2).all()
            elif kind == 2:
                assert (comm.all_reduce(small.copy()) == comm.size).all()
            elif kind == 3:
                root = choice.randrange(comm.size)
                assert (comm.broadcast(x.copy(), root=root) == root).all()
            elif kind == 4:
                works = [comm.all_gather(x, out=out, async_op=True) for _ in range(2)]
                sum_ = comm.all_reduce(small.copy(), async_op=True)
                for work in [sum_, *works]:
                    work.wait()
                assert (out.reshape(comm.size, -1)[:, 0] == range(comm.size)).all()
            elif kind == 5:
                if comm.rank < 2:
                    y = np.empty_like(x)
                    if comm.rank == 0:
                        comm.send(x, 1)
                    else:
                        assert (comm.recv(y, 0) == 0).all()
            else:
                comm.barrier()

    ranks(fn, 3)


@pytest.mark.parametrize("seed", range(6))
def test_a_rank_killed_in_it_is_named(seed: int) -> None:
    gate = Gate()

    def fn(comm: Communicator) -> tuple[str, str]:
        out = empty(16 * MIB * comm.size, np.int32)
        out.fill(0)
        slot = out[comm.rank * 16 * MIB : (comm.rank + 1) * 16 * MIB]
        gate.arrive()
        try:
            while True:
                comm.all_gather(slot, out=out)
        except pycomm.CommError as error:
            return type(error).__name__, str(error)

    with started(fn, 3) as ranks:
        gate.wait_for(3)
        time.sleep(0.1 + random.Random(seed).random() * 0.1)
        ranks[seed % 3].kill()
        for rank in range(3):
            if rank == seed % 3:
                continue
            kind, text = ranks[rank].outcome(10)
            assert kind == "PeerLostError" and f"rank {seed % 3} " in text, text


SCRIPT = """
import hashlib, sys
import numpy as np
import pycomm
comm = pycomm.init()
rng = np.random.default_rng(comm.rank)
digest = hashlib.sha256()
for count in (2**20, 2**21 + 5):
    x = rng.standard_normal(count)
    digest.update(comm.all_gather(x).tobytes())
    digest.update(comm.broadcast(x.copy(), root=1).tobytes())
print(digest.hexdigest(), "instead" in comm.explain("all_gather", 2**20, "float64"))
"""


def test_off_gives_the_same_bits(tmp_path: Path) -> None:
    script = tmp_path / "digest.py"
    script.write_text(SCRIPT)
    digests = []
    for value in ("1", "0"):
        env = {**os.environ, "PYCOMM_SINGLE_COPY": value, "PYCOMM_DEBUG": "INFO"}
        command = [sys.executable, "-m", "pycomm", "run", "-n", "2", str(script)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        lines = sorted(line.split()[-2:] for line in done.stdout.splitlines() if line)
        assert lines[0] == lines[1] and lines[0][1] == str(value == "1"), done.stdout
        assert ("single copy on" in done.stderr) == (value == "1"), done.stderr
        digests.append(lines[0][0])
    assert digests[0] == digests[1] != hashlib.sha256().hexdigest()
