"""Jobs whose RANK, WORLD_SIZE and MASTER_* were set by hand."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pycomm.byhand import this_start

SAY = """
import os, sys
import numpy as np
import pycomm
comm = pycomm.init(timeout=float(sys.argv[1]))
name = os.environ.get("NAME", os.environ["PYTEST_CURRENT_TEST"])  # the latter is of no job
names = comm.all_gather(np.array([ord(name)]))
print(name, "sees", "".join(map(chr, names)))
"""
PLACE = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29533"}


class Jobs:
    def __init__(self) -> None:
        self.ranks: list[subprocess.Popen[str]] = []

    def start(
        self, rank: int, *more_arguments: str, through: tuple[str, ...] = (), timeout: float = 30, **more: str
    ) -> None:
        command = [*through, sys.executable, "-c", SAY, str(timeout), f"--local_rank={rank}", *more_arguments]
        env = {**os.environ, **PLACE, "PYTEST_CURRENT_TEST": "-", "RANK": str(rank), **more}
        self.ranks.append(
            subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )

    def ends(self) -> list[tuple[int, str, str]]:
        return [(rank.wait(), *rank.communicate(timeout=60)) for rank in self.ranks]


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    found = Jobs()
    yield found
    for rank in found.ranks:
        rank.kill()


# A separate shell, like another terminal.
SHELL = ("env", "-u", "RANK", "sh", "-c", 'rank=$0; shift 0; RANK=$rank "$@"; exit $?')


def shell(rank: int) -> tuple[str, ...]:
    return (*SHELL, str(rank))


@pytest.mark.parametrize("apart", ["name", "seed", "variable"])
def test_two_jobs_of_one_process(jobs: Jobs, apart: str) -> None:
    for name, rank in (("A", 0), ("B", 1), ("A", 1), ("B", 0)):
        other = str(int(name == "B"))
        if apart == "name":
            jobs.start(rank, NAME=name)
        elif apart == "seed":
            jobs.start(rank, f"--seed={other}", PYTHONHASHSEED="0", PYTEST_CURRENT_TEST=name)
        else:
            jobs.start(rank, LORA_RANK=other, PYTEST_CURRENT_TEST=name)
    for name, (code, out, err) in zip("ABAB", jobs.ends(), strict=True):
        assert (code, out) == (0, f"{name} sees {2 * name}\n"), err


def test_what_tells_ranks_apart_does_not_tell_jobs_apart(jobs: Jobs) -> None:
    for rank in (0, 1):
        own = {"CUDA_VISIBLE_DEVICES": f"{4 + rank}", "GPU_ID": str(rank)}
        jobs.start(rank, through=("sh", "-c", '"$@"; exit $?', "sh"), SHLVL=str(rank + 3), **own)
    for code, out, err in jobs.ends():
        assert (code, out) == (0, "- sees --\n"), err


def test_ranks_of_two_shells_wait_and_say_so(jobs: Jobs) -> None:
    for rank in (0, 1):
        jobs.start(rank, through=shell(rank), timeout=5)
    for rank, (code, _, err) in enumerate(jobs.ends()):
        assert code == 1
        warning, *_ = err.splitlines()
        assert warning.startswith(f"pycomm: rank {rank} (pid ") and "waits for the other ranks" in warning
        assert f"RANK={1 - rank} and the same MASTER_PORT, but another process started it" in warning
        assert warning.endswith("start all ranks with the same PYCOMM_JOB=<any word>, or with `pycomm run`")
        assert "CommTimeoutError" in err and err.count("PYCOMM_JOB") == 2


def test_one_word_makes_them_one_job(jobs: Jobs) -> None:
    for rank in (0, 1):
        jobs.start(rank, through=shell(rank), PYCOMM_JOB="mine", NAME="xy"[rank])
    assert sorted(end[1] for end in jobs.ends()) == ["x sees xy\n", "y sees xy\n"]


def test_what_the_program_sets_itself_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = this_start().name()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert this_start().name() == before
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--lr=0.2"])
    assert this_start().name() != before


def test_whatever_differs_is_named(jobs: Jobs) -> None:
    for rank, job in enumerate(("mine", "mien")):
        jobs.start(rank, timeout=5, PYCOMM_JOB=job)
    for rank in (0, 1):
        jobs.start(rank, f"--log=out.{rank}.txt", timeout=5, MASTER_PORT="29534", SECRET="s3cr3t")
    for (code, _, err), what in zip(
        jobs.ends(), ["its PYCOMM_JOB"] * 2 + ["its command line"] * 2, strict=True
    ):
        assert code == 1 and err.count(f"{what} differs: they are taken for two jobs") == 2
        assert "s3cr3t" not in err


def test_a_program_that_a_rank_starts_is_no_rank(jobs: Jobs) -> None:
    code = """
import subprocess, sys
import pycomm
comm = pycomm.init()
sys.exit(subprocess.run([sys.executable, "-c", "import pycomm; pycomm.init()"]).returncode)
"""
    for rank in (0, 1):
        env = {**os.environ, **PLACE, "RANK": str(rank)}
        command = [sys.executable, "-c", code]
        jobs.ranks.append(
            subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    for code, _, err in jobs.ends():
        assert code == 1 and "has only inherited what the launcher told it" in err
