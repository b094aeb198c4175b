import os
import subprocess
import sys

import pytest

from pycomm.world import find_world

PYCOMM = {"PYCOMM_RANK": "1", "PYCOMM_SIZE": "4", "PYCOMM_JOB": "a1b2"}
TORCHRUN = {
    "RANK": "2",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "2",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "run",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-77@1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "3"}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "3",
    "SLURM_NNODES": "1",
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
}


@pytest.mark.parametrize(
    ("environ", "launcher", "rank", "size"),
    [
        (PYCOMM, "pycomm run", 1, 4),
        (TORCHRUN, "torchrun", 2, 4),
        (OPEN_MPI, "Open MPI", 1, 2),
        (MPICH, "MPICH", 1, 3),
        (SLURM, "Slurm", 3, 4),
        ({}, "none", 0, 1),
    ],
)
def test_launchers(environ: dict[str, str], launcher: str, rank: int, size: int) -> None:
    world = find_world(environ)
    assert (world.launcher, world.rank, world.size) == (launcher, rank, size)
    assert (world.local_rank, world.local_size) == (rank, size)


@pytest.mark.parametrize("environ", [PYCOMM, TORCHRUN, OPEN_MPI, MPICH, SLURM])
def test_ranks_of_a_job_share_the_address(environ: dict[str, str]) -> None:
    names = ("PYCOMM_RANK", "RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    locals_ = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
    other = {name: "0" if name in names + locals_ else value for name, value in environ.items()}
    assert find_world(other).rank == 0
    assert find_world(other).address == find_world(environ).address


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        (PYCOMM, "PYCOMM_JOB"),
        (TORCHRUN, "MASTER_ADDR"),
        (TORCHRUN, "MASTER_PORT"),
        (TORCHRUN, "TORCHELASTIC_RUN_ID"),
        (TORCHRUN, "TORCHELASTIC_RESTART_COUNT"),
        (OPEN_MPI, "PMIX_NAMESPACE"),
        (SLURM, "SLURM_JOB_ID"),
        (SLURM, "SLURM_STEP_ID"),
    ],
)
def test_another_job_has_another_address(environ: dict[str, str], name: str) -> None:
    assert find_world({**environ, name: "7"}).address != find_world(environ).address


def test_alone_is_never_joined() -> None:
    assert find_world({}).address != find_world({}).address


def test_a_launcher_within_another() -> None:
    assert find_world({**SLURM, **OPEN_MPI, **TORCHRUN, **PYCOMM}).launcher == "pycomm run"
    assert find_world({**SLURM, **OPEN_MPI, **TORCHRUN}).launcher == "torchrun"
    assert find_world({**SLURM, **MPICH}).launcher == "MPICH"
    # srun that speaks PMI itself
    assert find_world({**SLURM, "PMI_RANK": "3", "PMI_SIZE": "4"}).launcher == "Slurm"


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967290"}, {"SLURM_STEP_ID": "4294967291"}])
def test_a_slurm_script_without_srun_is_alone(step: dict[str, str]) -> None:
    batch = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert find_world({**batch, **step}).size == 1


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"RANK": "0"}, ["MASTER_ADDR"]),
        ({**TORCHRUN, "WORLD_SIZE": ""}, ["WORLD_SIZE"]),
        ({**TORCHRUN, "RANK": "4"}, ["RANK=4", "WORLD_SIZE=4"]),
        ({**TORCHRUN, "RANK": "-1"}, ["RANK=-1"]),
        ({**TORCHRUN, "RANK": "two"}, ["RANK='two'"]),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, ["WORLD_SIZE=0"]),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, ["LOCAL_WORLD_SIZE=8", "WORLD_SIZE=4"]),
        ({"PYCOMM_RANK": "0", "PYCOMM_JOB": "x"}, ["PYCOMM_SIZE"]),
        ({"PYCOMM_SIZE": "2", "PYCOMM_JOB": "x"}, ["PYCOMM_RANK"]),
        ({"OMPI_COMM_WORLD_RANK": "0"}, ["OMPI_COMM_WORLD_SIZE"]),
        ({"PMI_SIZE": "2"}, ["PMI_RANK"]),
        ({**SLURM, "SLURM_NTASKS": ""}, ["SLURM_NTASKS"]),
    ],
)
def test_contradictions_are_named(environ: dict[str, str], names: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        find_world(environ)
    for name in names:
        assert name in str(raised.value)


@pytest.mark.parametrize(
    ("environ", "evidence"),
    [
        ({**TORCHRUN, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE=2"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "LOCAL_SIZE=1"),
        ({**MPICH, "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}, "MPI_LOCALNRANKS=1"),
        ({**SLURM, "SLURM_NNODES": "2"}, "SLURM_NNODES=2"),
    ],
)
def test_several_hosts_are_refused(environ: dict[str, str], evidence: str) -> None:
    with pytest.raises(ValueError, match="several hosts") as raised:
        find_world(environ)
    assert evidence in str(raised.value)


def test_a_shell_between_launcher_and_rank() -> None:
    """MPICH names no job: its ranks share the process that started them, whatever lies between."""
    code = "from pycomm.world import find_world; print(find_world().address)"
    direct = [sys.executable, "-c", code]
    in_shell = ["sh", "-c", '"$@"; true', "sh", *direct]
    environ = {**os.environ, **MPICH}
    for name in (*PYCOMM, *TORCHRUN, *OPEN_MPI, *SLURM):
        environ.pop(name, None)
    outputs = [
        subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=60).stdout
        for command in (direct, in_shell)
    ]
    assert outputs[0] == outputs[1] == f"MPICH|pid {os.getpid()}\n"
