"""Finds the world: which rank this process is, of how many, and what names the job.

A launcher sets variables in its processes' environment. The first of these that is found counts::

    pycomm run   PYCOMM_RANK PYCOMM_SIZE PYCOMM_JOB
    torchrun     RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
                 TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT
    Open MPI     OMPI_COMM_WORLD_{RANK,SIZE,LOCAL_RANK,LOCAL_SIZE} PMIX_NAMESPACE
    MPICH        PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS
    Slurm        SLURM_PROCID SLURM_NTASKS SLURM_LOCALID SLURM_NNODES SLURM_JOB_ID SLURM_STEP_ID

RANK, WORLD_SIZE and MASTER_* may also be set by hand (pycomm.byhand says how such a job is named). A process
that none of them started is alone, in a world of one. Variables that are incomplete or contradict each other
are a ValueError; nothing is guessed.

Children inherit the environment, but a rank is one process. The first process that takes a rank records that
in its own environment, so a program that it starts can tell. A child of fork() also has its memory, which
shows what it is.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pycomm.byhand import parent_of, this_start

BY_HAND = "by hand"  # marks the addresses of jobs that no launcher started
TAKEN = "PYCOMM_TAKEN"  # the process that has taken the rank, and the rank
VARIABLES = ("PYCOMM_RANK", "PYCOMM_SIZE", "PYCOMM_JOB", TAKEN)  # pycomm's own
_OPEN_MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str  # the ranks of this job share it, and no other job has it
    launcher: str


_taken = ""  # what this process, or one that it was forked from, has written to TAKEN


def find_world(environ: Mapping[str, str] = os.environ) -> World:
    """The world as the launcher describes it."""
    world = _described_world(_Environment(environ), environ)
    taken = environ.get(TAKEN, "")
    pid, _, place = taken.partition(" ")
    if place == _place(world) and taken != _taken and pid != str(os.getpid()):
        raise ValueError(
            f"process {pid} is rank {world.rank} of {world.size}, and this process (pid {os.getpid()}), which"
            " it started, has only inherited what the launcher told it: start this program with"
            " PYCOMM_RANK=0 and PYCOMM_SIZE=1 for a world of one, or with `pycomm run` for ranks of its own"
        )
    return world


def take(world: World) -> None:
    """Records that this process is the rank that it found, so that programs which it starts are not."""
    global _taken
    if world.size == 1:  # any number of processes may have a world of one
        return
    _taken = f"{os.getpid()} {_place(world)}"
    os.environ[TAKEN] = _taken


def job_address(job: str) -> str:
    """The address of a job of `pycomm run`."""
    return f"pycomm run|{job}"


def by_hand(world: World) -> bool:
    """Whether only the user's settings name the job."""
    return BY_HAND in world.address or (world.launcher == "torchrun" and "|PYCOMM_JOB=" in world.address)


def _place(world: World) -> str:
    # Without the name of a job started by hand, since a program that a rank starts does not have it.
    return f"{world.rank}/{world.size} {world.address.partition(BY_HAND)[0]}"


def _described_world(env: _Environment, environ: Mapping[str, str]) -> World:
    if env.has("PYCOMM_RANK", "PYCOMM_SIZE"):
        return env.world(
            "pycomm run", "PYCOMM_RANK", "PYCOMM_SIZE", None, None, lambda: env.text("PYCOMM_JOB")
        )
    if env.has("RANK", "WORLD_SIZE"):
        local_rank, local_size = "LOCAL_RANK", "LOCAL_WORLD_SIZE"
        return env.world("torchrun", "RANK", "WORLD_SIZE", local_rank, local_size, lambda: _torch_job(env))
    if env.has("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        rank, size, local_rank, local_size = (
            f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        )
        return env.world(
            "Open MPI", rank, size, local_rank, local_size, lambda: env.job(_OPEN_MPI_JOBS, rank)
        )
    # srun may set PMI variables, too, but not those of local ranks, for which its own are needed.
    if env.has("PMI_RANK", "PMI_SIZE") and (env.has("MPI_LOCALNRANKS") or not env.in_slurm_step()):
        local_rank, local_size = "MPI_LOCALRANKID", "MPI_LOCALNRANKS"
        return env.world(
            "MPICH",
            "PMI_RANK",
            "PMI_SIZE",
            local_rank,
            local_size,
            lambda: env.job(["PMI_JOBID"], "PMI_RANK"),
        )
    if env.in_slurm_step():
        return env.slurm_world()
    return World(0, 1, 0, 1, _nobody(), "none")


def _torch_job(env: _Environment) -> str:
    place = f"{env.text('MASTER_ADDR')}|{env.text('MASTER_PORT')}"
    if env.has("TORCHELASTIC_RUN_ID"):
        # torchrun holds MASTER_PORT itself, so no other live job on this machine has the same port; a
        # restarted attempt may have everything the same but its count.
        attempt = [env.get(f"TORCHELASTIC_{name}") for name in ("RUN_ID", "RESTART_COUNT")]
        return "|".join([place, *attempt])
    # A script between another launcher and Python may set torchrun's variables.
    launchers = ["PYCOMM_JOB", *_OPEN_MPI_JOBS, "PMI_JOBID"]
    if env.in_slurm_step():
        launchers += ["SLURM_JOB_ID", "SLURM_STEP_ID"]
    named = [f"{name}={env.get(name)}" for name in launchers if env.get(name)]
    if named:
        return "|".join([place, *named])
    return f"{place}|{BY_HAND}|{this_start().name()}"


class _Environment:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def has(self, *names: str) -> bool:
        """Whether any is set. All are read later, and a missing one is reported then."""
        return any(name in self._environ for name in names)

    def get(self, name: str) -> str:
        return self._environ.get(name, "")

    def text(self, name: str) -> str:
        value = self._environ.get(name, "")
        if not value.strip():
            what = f"{name}={value!r} is empty" if name in self._environ else f"{name} is not set"
            raise ValueError(
                f"{what}, but other variables that describe the world are set: start the ranks"
                " with `pycomm run`, torchrun, mpirun or srun, set it yourself, or unset the others as"
                " well for a world of one"
            )
        return value

    def job(self, names: Sequence[str], rank_name: str) -> str:
        """The first of these that is set, or the pid of the process that started the ranks."""
        named = next(filter(None, map(self._environ.get, names)), None)
        return named or f"pid {parent_of(os.getpid(), rank_name)}"

    def integer(self, name: str) -> int:
        value = self.text(name)
        try:
            return int(value)
        except ValueError:
            raise ValueError(
                f"{name}={value!r} is not an integer: let the launcher set it, or correct it"
            ) from None

    def world(
        self,
        launcher: str,
        rank: str,
        size: str,
        local_rank: str | None,
        local_size: str | None,
        job: Callable[[], str],
    ) -> World:
        """Reads the variables of these names, and calls `job` last. Without the local ones all ranks are on
        this machine."""
        in_world = self._rank_and_size(rank, size)
        local = in_world
        if local_rank and local_size and self.has(local_rank, local_size):
            local = self._rank_and_size(local_rank, local_size)
            if local[1] > in_world[1]:
                raise ValueError(
                    f"{local_size}={local[1]} is more than {size}={in_world[1]}: a machine cannot hold"
                    " more ranks than the world; unset or correct one of them"
                )
            if local[1] < in_world[1]:
                raise _several_hosts(f"{local_size}={local[1]} is less than {size}={in_world[1]}")
        # A world of one meets nobody and needs no address of a job.
        address = f"{launcher}|{job()}" if in_world[1] > 1 else _nobody()
        return World(*in_world, *local, address=address, launcher=launcher)

    def in_slurm_step(self) -> bool:
        # A batch script and an interactive shell see SLURM_PROCID and SLURM_NTASKS, too, though srun started
        # no ranks there: they have no step, or one of the reserved numbers at the end of the range.
        name = "SLURM_STEP_ID"
        return bool(self._environ.get(name)) and self.integer(name) < 0xFFFFFFF0

    def slurm_world(self) -> World:
        nodes = "SLURM_STEP_NUM_NODES" if self.has("SLURM_STEP_NUM_NODES") else "SLURM_NNODES"
        if self.has(nodes) and self.integer(nodes) > 1:
            raise _several_hosts(f"{nodes}={self.integer(nodes)}")
        rank, size = self._rank_and_size("SLURM_PROCID", "SLURM_NTASKS")
        local_rank = self.integer("SLURM_LOCALID") if self.has("SLURM_LOCALID") else rank
        job = f"Slurm|{self.text('SLURM_JOB_ID')}|{self.text('SLURM_STEP_ID')}" if size > 1 else _nobody()
        return World(rank, size, local_rank, size, job, "Slurm")

    def _rank_and_size(self, rank_name: str, size_name: str) -> tuple[int, int]:
        rank, size = self.integer(rank_name), self.integer(size_name)
        if size < 1:
            raise ValueError(f"{size_name}={size}: a world has at least one rank")
        if not 0 <= rank < size:
            raise ValueError(
                f"{rank_name}={rank} does not fit {size_name}={size}: ranks go from 0 to {size - 1}"
            )
        return rank, size


def _nobody() -> str:
    """The address of a world of one, which no other process has."""
    return secrets.token_hex(16)


def _several_hosts(evidence: str) -> ValueError:
    return ValueError(
        f"the job spans several hosts ({evidence}), but pycomm joins ranks of one machine: start all ranks"
        " on one host"
    )
