"""Sets of ranks: N processes of one engine, which wait until they are told to run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pycomm
from pycomm.bench.peers import Peer, SetError, our_path, pycomm_commands, start_s
from pycomm.launch import split_cores

WORKERS = Path(__file__).parent / "workers"
ANSWER_S = 300.0
PYCOMM = WORKERS / "engine_pycomm.py"
Cpus = Sequence[Sequence[int]]  # those of each rank


def _own_group() -> None:
    """Makes a process group, no session: the kernel shares cores between sessions first (pycomm.launch)."""
    os.setpgid(0, 0)


class RankSet:
    """The ranks of one engine. Every order goes to all of them; their answers come back in rank order."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.version = self.origin = ""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._streams: list[IO[str]] = []
        self._sockets: list[socket.socket] = []
        self._cleanup = contextlib.ExitStack()
        directory = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="pycomm-bench-"))
        self._directory = Path(directory)

    @classmethod
    def of_pycomm(cls, size: int, engine: Path = PYCOMM, cpus: Cpus | None = None) -> RankSet:
        """`cpus`: those of each rank. By default each rank has a core; more ranks than cores share them."""
        ranks = cls("pycomm", size)
        ranks._start(pycomm_commands(ranks._worker(sys.executable, engine, cpus), size, our_path()))
        return ranks

    @classmethod
    def of_peer(cls, peer: Peer, size: int, cpus: Cpus | None = None) -> RankSet:
        ranks = cls(peer.name, size)
        worker = ranks._worker(peer.python, WORKERS / peer.kind.engine, cpus, pinned=peer.kind.pinned)
        try:
            ranks._start(peer.commands(worker, size))
        except SetError:
            ranks.close()
            raise
        if peer.kind_name == "pycomm" and ranks.origin == pycomm.__file__:
            ranks.close()
            raise SetError(f"{peer.root or peer.python} imports the pycomm that it is compared with")
        if peer.root and Path(peer.root).resolve() not in Path(ranks.origin).resolve().parents:
            ranks.close()
            raise SetError(
                f"{peer.python} has a pycomm installed, {ranks.origin}, which comes before {peer.root}: name"
                " the interpreter of an environment that has the other one"
            )
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
        """Ends the ranks by closing their streams. A rank that does not react is killed."""
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.close()
        for link in self._sockets:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()
        if not self._streams:  # the ranks are still starting and read no orders
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

    def _worker(self, python: str, engine: Path, cpus: Cpus | None, *, pinned: bool = True) -> list[str]:
        """The command of a rank, with its number left open. Ranks of single-threaded engines are pinned to a
        core, so that they do not migrate; engines that pass data between threads are slower if these share a
        core."""
        if cpus is None:
            places = split_cores(self.size)
            allowed = sorted(set().union(*places))
            own = len(allowed) >= self.size
            cpus = [[min(places[r]) if own else allowed[r % len(allowed)]] for r in range(self.size)]
            if not pinned:
                cpus = [allowed] * self.size
        script, address = str(WORKERS / "worker.py"), str(self._directory / "socket")
        return [python, script, str(engine), address, "RANK", str(self.size), json.dumps(cpus)]

    def _start(self, commands: Sequence[tuple[list[str], dict[str, str]]]) -> None:
        with (
            socket.socket(socket.AF_UNIX) as listener,
            open(self._directory / "stderr", "wb") as errors,
        ):
            listener.bind(str(self._directory / "socket"))
            listener.listen(self.size)
            try:
                for rank, (command, env) in enumerate(commands):
                    self._processes.append(
                        subprocess.Popen(
                            [str(rank) if word == "RANK" else word for word in command],
                            env={**os.environ, **env},
                            stdin=subprocess.DEVNULL,
                            stdout=errors,
                            stderr=errors,
                            preexec_fn=_own_group,
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
                    late = f"{len(found)} of {self.size} ranks started within {limit:.0f} s"
                    raise SetError(late) from None
                continue
            link.settimeout(ANSWER_S)
            stream = link.makefile("rw")
            hello = json.loads(stream.readline())
            self._sockets.append(link)
            found[hello["rank"]] = stream
            self.version, self.origin = hello["version"], hello["origin"]
        self._streams = [found[rank] for rank in range(self.size)]

    def _last_words(self) -> str:
        """The last line of the ranks' output that mentions an error, else the last line."""
        text = (self._directory / "stderr").read_text(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip(" -*\t")]
        of_errors = [line for line in lines if "Error" in line]
        return (of_errors or lines or ["it gave no reason"])[-1]
