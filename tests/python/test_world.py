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


@pytest.mark.parametrize(
    "environ", [{"PYCOMM_RANK": "0", "PYCOMM_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}]
)
def test_a_world_of_one_needs_no_job(environ: dict[str, str]) -> None:
    assert find_world(environ).size == 1
    assert find_world(environ).address != find_world(environ).address


def test_a_launcher_within_another() -> None:
    assert find_world({**SLURM, **OPEN_MPI, **TORCHRUN, **PYCOMM}).launcher == "pycomm run"
    assert find_world({**SLURM, **OPEN_MPI, **TORCHRUN}).launcher == "torchrun"
    assert find_world({**SLURM, **MPICH}).launcher == "MPICH"
    # an srun that sets PMI variables
    assert find_world({**SLURM, "PMI_RANK": "3", "PMI_SIZE": "4"}).launcher == "Slurm"


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967290"}, {"SLURM_STEP_ID": "4294967291"}])
def test_a_slurm_script_without_srun_is_alone(step: dict[str, str]) -> None:
    batch = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert find_world({**batch, **step}).size == 1


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE is not set"]),
        ({"RANK": ""}, ["RANK='' is empty"]),
        ({"RANK": "0", "WORLD_SIZE": " "}, ["WORLD_SIZE=' ' is empty"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR is not set"]),
        ({**TORCHRUN, "LOCAL_RANK": ""}, ["LOCAL_RANK='' is empty"]),
        ({"PYCOMM_RANK": "x", "PYCOMM_SIZE": "2"}, ["PYCOMM_RANK='x'"]),
        ({"PYCOMM_RANK": "0", "PYCOMM_SIZE": "2", "PYCOMM_JOB": ""}, ["PYCOMM_JOB='' is empty"]),
        ({**SLURM, "SLURM_STEP_ID": "first"}, ["SLURM_STEP_ID='first'"]),
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
    """MPICH has no name of a job: its ranks share the process that started them, whatever is in between."""
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


INIT = "import pycomm; comm = pycomm.init(timeout=20); print(comm.rank, comm.size, flush=True)"
START = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {INIT!r}]).returncode)"


def outcomes_of_ranks(*codes: str) -> list["subprocess.CompletedProcess[str]"]:
    """Outcomes of programs as if torchrun had started them; other launchers' ranks behave in the same way."""
    names = ("RANK", "LOCAL_RANK")
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(len(codes)))
    job = {"MASTER_ADDR": "localhost", "MASTER_PORT": f"test {os.getpid()}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **dict.fromkeys(names, str(rank)), **sizes, **job},
            **pipes,
            text=True,
        )
        for rank, code in enumerate(codes)
    ]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    return [
        subprocess.CompletedProcess(rank.args, rank.returncode, *output)
        for rank, output in zip(ranks, outputs, strict=True)
    ]


def test_a_program_that_a_rank_starts_is_not_the_rank() -> None:
    for rank, done in enumerate(outcomes_of_ranks(*[f"{INIT}\n{START}"] * 2)):
        assert done.returncode == 1 and done.stdout == f"{rank} 2\n"
        assert f"is rank {rank} of 2" in done.stderr and "PYCOMM_RANK=0 and PYCOMM_SIZE=1" in done.stderr
        assert "CommTimeoutError" not in done.stderr


def test_a_program_that_a_rank_starts_may_be_alone() -> None:
    alone = "import os; os.environ.update(PYCOMM_RANK='0', PYCOMM_SIZE='1')"
    for rank, done in enumerate(outcomes_of_ranks(*[f"{INIT}\n{alone}\n{START}"] * 2)):
        assert done.stdout == f"{rank} 2\n0 1\n", done.stderr


def test_a_program_between_launcher_and_rank() -> None:
    command = f"['sh', '-c', 'env \"$@\"; :', 'sh', sys.executable, '-c', {START!r}]"
    shell = f"import subprocess, sys; subprocess.run({command})"
    for rank, done in enumerate(outcomes_of_ranks(shell, START)):
        assert done.stdout == f"{rank} 2\n", done.stderr


def test_children_of_fork_have_a_group_of_their_own() -> None:
    code = f"""
import os, sys
{INIT}
if child := os.fork():
    os.waitpid(child, 0)
    sys.exit()
{INIT}
comm.close()
os._exit(0)
"""
    for rank, done in enumerate(outcomes_of_ranks(code, code)):
        assert done.stdout == f"{rank} 2\n" * 2, done.stderr
