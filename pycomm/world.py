"""Finds the world: which rank this process is, of how many, and what names the job.

A launcher tells its processes in the environment. The first one found here is believed::

    pycomm run   PYCOMM_RANK PYCOMM_SIZE PYCOMM_JOB
    torchrun     RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
                 TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT
    Open MPI     OMPI_COMM_WORLD_{RANK,SIZE,LOCAL_RANK,LOCAL_SIZE} PMIX_NAMESPACE
    MPICH        PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS
    Slurm        SLURM_PROCID SLURM_NTASKS SLURM_LOCALID SLURM_NNODES SLURM_JOB_ID SLURM_STEP_ID

A process that none of them started is alone, a world of one. Variables that are incomplete or contradict each
other are a ValueError, never a guess.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str  # the ranks of this job share it, and no other job has it
    launcher: str


def find_world(environ: Mapping[str, str] = os.environ) -> World:
    """The world as the launcher describes it."""
    env = _Environment(environ)
    if env.has("PYCOMM_RANK", "PYCOMM_SIZE"):
        job = env.text("PYCOMM_JOB")
        return env.world("pycomm run", "PYCOMM_RANK", "PYCOMM_SIZE", None, None, job)
    if env.has("RANK", "WORLD_SIZE"):
        # torchrun holds MASTER_PORT itself, so no other live job on this machine has the same; a restarted
        # attempt may reuse all but its count.
        attempt = [environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT")]
        job = "|".join([env.text("MASTER_ADDR"), env.text("MASTER_PORT"), *attempt])
        return env.world("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", job)
    if env.has("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        rank, size, local_rank, local_size = (
            f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        )
        job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid") or _parent_job(rank)
        return env.world("Open MPI", rank, size, local_rank, local_size, job)
    # srun may speak PMI as well, but then says nothing of local ranks, which its own variables do.
    if env.has("PMI_RANK", "PMI_SIZE") and (env.has("MPI_LOCALNRANKS") or not _in_slurm_step(environ)):
        job = environ.get("PMI_JOBID") or _parent_job("PMI_RANK")
        return env.world("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", job)
    if _in_slurm_step(environ):
        return env.slurm_world()
    return World(0, 1, 0, 1, secrets.token_hex(16), "none")


class _Environment:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def has(self, *names: str) -> bool:
        """Whether any is set. All are asked for later, and one that is missing is named then."""
        return any(name in self._environ for name in names)

    def text(self, name: str) -> str:
        value = self._environ.get(name)
        if not value:
            raise ValueError(
                f"{name} is not set, but the variables beside it are, so that the world is unknown: start"
                " the ranks with `pycomm run`, torchrun, mpirun or srun, set it yourself, or unset the others"
                " to be alone"
            )
        return value

    def integer(self, name: str) -> int:
        value = self.text(name)
        try:
            return int(value)
        except ValueError:
            raise ValueError(
                f"{name}={value!r} is not a whole number: the launcher sets it, or set it right"
            ) from None

    def world(
        self, launcher: str, rank: str, size: str, local_rank: str | None, local_size: str | None, job: str
    ) -> World:
        """Reads the variables of these names. Without the local ones all ranks are on this machine."""
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
        return World(*in_world, *local, address=f"{launcher}|{job}", launcher=launcher)

    def slurm_world(self) -> World:
        nodes = "SLURM_STEP_NUM_NODES" if self.has("SLURM_STEP_NUM_NODES") else "SLURM_NNODES"
        if self.has(nodes) and self.integer(nodes) > 1:
            raise _several_hosts(f"{nodes}={self.integer(nodes)}")
        rank, size = self._rank_and_size("SLURM_PROCID", "SLURM_NTASKS")
        local_rank = self.integer("SLURM_LOCALID") if self.has("SLURM_LOCALID") else rank
        job = f"Slurm|{self.text('SLURM_JOB_ID')}|{self.text('SLURM_STEP_ID')}"
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


def _several_hosts(evidence: str) -> ValueError:
    return ValueError(
        f"the job spans several hosts ({evidence}), but pycomm joins ranks of one machine: start all ranks"
        " on one host"
    )


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    # A batch script and an interactive shell see SLURM_PROCID and SLURM_NTASKS too, though srun started no
    # ranks there: they have no step, or one of the reserved numbers at the end of the range.
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < 0xFFFFFFF0


def _parent_job(rank_name: str) -> str:
    """Names the job by the process that started its ranks: the nearest ancestor that is not part of a rank
    itself, as a shell between launcher and Python would be."""
    pid = os.getppid()
    while pid > 1 and _environ_has(pid, rank_name):
        pid = _parent(pid)
    return f"pid {pid}"


def _environ_has(pid: int, name: str) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return any(entry.startswith(name.encode() + b"=") for entry in file.read().split(b"\0"))
    except OSError:
        return False


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The name before it is in parentheses and may hold anything.
        return int(file.read().rpartition(b")")[2].split()[1])
