"""One rank of a set that is measured: `python worker.py ENGINE SOCKET RANK SIZE CPUS`.

ENGINE is the file of a class `Engine` (see its protocol below). The rank connects to the coordinator's socket
and then follows orders, each a line of JSON. Between orders it sleeps in a read, so that a set that is not
measured takes no time from the one that is. It runs in any interpreter that has NumPy and the engine's
packages.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import sys
import time
import timeit
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from data import Array, Case, fill, numpy_dtype, spoil, wrong
from memory import PAGE, Caches, placed, plain

FORMS = ("out_of_place", "in_place")


class Engine(Protocol):
    rank: int
    version: str

    def __init__(self, rank: int, size: int, directory: str) -> None:
        """Joins the other ranks. MPI gives the rank itself; `directory` is for files by which ranks meet."""

    def barrier(self) -> None: ...

    def empty(self, count: int, dtype: np.dtype[Any]) -> Array:
        """Memory as the engine's users usually have it."""

    def symmetric(self, count: int, dtype: np.dtype[Any]) -> Array:
        """The engine's own memory, allocated by all ranks together. Only pycomm is asked for it."""

    def shared(self, count: int, dtype: np.dtype[Any]) -> Array:
        """An array of pycomm.shared_arrays(). Asked of pycomm alone."""

    def in_place_part(self, case: Case) -> int:
        """Which part of the larger buffer is the smaller one, in a call in place."""

    def bind(
        self, case: Case, form: str, variant: dict[str, Any], x: Array, out: Array
    ) -> tuple[str, dict[str, Any]] | None:
        """The call as its user would write it, and the names in it; None if it has no such form."""

    def start(self, text: str) -> str:
        """The asynchronous form of a blocking call's text: an expression whose value has `wait`."""

    def algorithm(self, case: Case, variant: dict[str, Any]) -> str: ...

    def close(self) -> None: ...


class Worker:
    def __init__(self, engine: Engine, size: int) -> None:
        self.engine = engine
        self.size = size
        self.buffers: dict[str, tuple[Array, Array]] = {}
        self.calls: dict[tuple[int, str], tuple[timeit.Timer, timeit.Timer]] = {}
        self.moments: list[float] = []
        self.caches: Caches | None = None
        self.units = 0  # units of computation in `compute`
        self.vector = np.ones(4096, np.float32)

    def open(self, case: dict[str, Any], variants: list[dict[str, Any]], check: bool) -> list[dict[str, Any]]:
        """Binds a case in its variants. Returns for each which forms it has, what ran and how many elements
        were wrong, or why it cannot run; `lacks` if there is no such call at all."""
        self.close()
        return [self._open(Case(**case), number, variant, check) for number, variant in enumerate(variants)]

    def _open(self, case: Case, number: int, variant: dict[str, Any], check: bool) -> dict[str, Any]:
        forms: dict[str, int] = {}
        try:
            for form in variant["forms"]:
                x, out = self._buffers(case, form, variant)
                bound = self.engine.bind(case, form, variant, x, out)
                if bound is None:
                    continue
                text, names = bound
                names["moment"] = self._moment
                call = timeit.Timer(text, globals=names)
                spoil(out)  # in place: all but the input's part
                fill(x, case, self.engine.rank, self.size)
                self.engine.barrier()
                call.timeit(1)
                lossy = variant["codec"] is not None
                forms[form] = wrong(x, out, case, self.engine.rank, self.size, lossy) if check else 0
                self.calls[number, form] = (call, timeit.Timer(f"moment()\n{text}\nmoment()", globals=names))
            if not forms:
                return {"error": f"has no {case.collective}", "lacks": True}
            chosen = self.engine.algorithm(case, {**variant, "algorithm": None})
            return {"forms": forms, "algorithm": self.engine.algorithm(case, variant), "default": chosen}
        except Exception as error:  # from any engine: reported as the answer
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}

    def open_overlap(self, case: dict[str, Any], variant: dict[str, Any], check: bool) -> dict[str, Any]:
        """Like open; also binds the first form's asynchronous call, alone and with `compute` during it."""
        [answer] = self.open(case, [variant], check)
        if "error" in answer:
            return answer
        form = next(iter(answer["forms"]))
        of = Case(**case)
        x, out = self._buffers(of, form, variant)
        bound = self.engine.bind(of, form, variant, x, out)
        assert bound is not None
        text, names = bound
        names["compute"] = self._compute
        try:
            start = f"work = {self.engine.start(text)}"
        except AttributeError:
            return {"error": f"has no asynchronous {of.collective}", "lacks": True}
        texts = {
            "blocking": text,
            "alone": f"{start}; work.wait()",
            "compute": "compute()",
            "together": f"{start}; compute(); work.wait()",
        }
        for name, words in texts.items():
            timer = timeit.Timer(words, globals=names)
            self.calls[0, name] = timer, timer
        return {**answer, "form": form}

    def compute_for(self, units: int) -> None:
        self.units = units

    def _compute(self) -> None:
        """Computes in the first-level cache, so that it does not interfere with the call's data."""
        for _ in range(self.units):
            np.multiply(self.vector, self.vector, out=self.vector)

    def _buffers(self, case: Case, form: str, variant: dict[str, Any]) -> tuple[Array, Array]:
        """x and out. In place, the smaller is a part of the larger, as the collective defines."""
        rank = self.engine.rank
        x, out = self._memory(case, variant)
        if form == "out_of_place":
            return x, out
        if case.collective in ("gather", "scatter") and rank != case.root:
            return x, out
        part = self.engine.in_place_part(case)
        mine = slice(part * case.count, (part + 1) * case.count)
        if out.size > x.size:
            return out[mine], out
        return x, x[mine] if x.size > out.size else x

    def _memory(self, case: Case, variant: dict[str, Any]) -> tuple[Array, Array]:
        """Two separate buffers. All offsets share the same pages, so that only the address differs."""
        dtype, kind, offsets = numpy_dtype(case.dtype), str(variant["buffers"]), variant["offsets"]
        counts = case.elements(self.size)
        if kind in ("symmetric", "shared"):
            if kind not in self.buffers:
                make = self.engine.symmetric if kind == "symmetric" else self.engine.shared
                sent, received = (make(count, dtype) for count in counts)
                self.buffers[kind] = sent, received
            return self.buffers[kind]
        if offsets is not None:
            if kind not in self.buffers:
                size = [count * dtype.itemsize + 2 * PAGE for count in counts]
                sent, received = (plain(n, np.dtype(np.uint8), 0, variant["huge"]) for n in size)
                self.buffers[kind] = sent, received
            sent, received = (
                placed(whole, count, dtype, offset)
                for whole, count, offset in zip(self.buffers[kind], counts, offsets, strict=True)
            )
            return sent, received
        if kind not in self.buffers:
            sent, received = (
                plain(count, dtype, huge=True) if variant["huge"] else self.engine.empty(count, dtype)
                for count in counts
            )
            self.buffers[kind] = sent, received
        return self.buffers[kind]

    def _moment(self, clock: Any = time.perf_counter) -> None:
        self.moments.append(clock())

    def time(self, number: int, form: str, samples: int, calls: int, warmup: int) -> list[float]:
        """Seconds for each of `samples` samples of `calls` calls in a row, which all ranks enter together."""
        timer = self.calls[number, form][0]
        timer.timeit(warmup)
        self.engine.barrier()
        return [timer.timeit(calls) for _ in range(samples)]

    def time_cold(self, number: int, form: str) -> list[float]:
        """Seconds for a call whose data is in no cache."""
        if self.caches is None:
            self.caches = Caches()
        self.caches.flush()
        self.engine.barrier()
        return [self.calls[number, form][0].timeit(1)]

    def trace(self, number: int, form: str, calls: int) -> list[list[float]]:
        """When this rank entered and left each of `calls` calls, by a clock that all ranks share."""
        self.moments.clear()
        self.engine.barrier()
        self.calls[number, form][1].timeit(calls)
        return [self.moments[0::2], self.moments[1::2]]

    def close(self) -> None:
        self.calls.clear()
        self.buffers.clear()
        gc.collect()


def _forget_our_modules() -> None:
    """Makes a user's data.py or load.py importable under its name, as outside of a worker."""
    here = Path(__file__).parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here.resolve()]
    for file in here.glob("*.py"):
        sys.modules.pop(file.stem, None)


def main() -> None:
    path, address, rank, size, cpus = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator ends the ranks
    engine: Engine = runpy.run_path(path)["Engine"](int(rank), int(size), str(Path(address).parent))
    _forget_our_modules()
    places = json.loads(cpus)
    os.sched_setaffinity(0, places[engine.rank])
    worker = Worker(engine, int(size))
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(address)
        stream = link.makefile("rw")

        def say(answer: object) -> None:
            stream.write(json.dumps(answer) + "\n")
            stream.flush()

        say({"rank": engine.rank, "version": engine.version, "origin": getattr(engine, "origin", "")})
        for line in stream:
            order = json.loads(line)
            say(getattr(worker, order.pop("do"))(**order))
        worker.close()
    engine.close()


if __name__ == "__main__":
    main()
