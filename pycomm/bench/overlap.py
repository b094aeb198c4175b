"""How much of an asynchronous call runs while the rank computes.

A call, and computation that takes as long as the call alone, are timed together: `together` is their sum if
nothing overlaps, and the longer of the two if everything does. overlap = 1 - (together - compute) / alone, as
in the OSU benchmarks, is the part of the call that computation hides.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pycomm.bench.measure import REPETITIONS, Engines, Form, Warn, cases, variant
from pycomm.bench.peers import Peer, SetError
from pycomm.bench.rows import NotRun, Options
from pycomm.bench.sets import RankSet
from pycomm.bench.workers.data import Case

PARTS = ("blocking", "alone", "compute", "together")
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all")


@dataclass
class Overlap:
    """Medians in microseconds."""

    collective: str
    bytes: int
    dtype: str
    ranks: int
    engine: str
    form: str
    blocking_us: float
    alone_us: float  # started and immediately waited for
    compute_us: float
    together_us: float
    wrong: int

    @property
    def overlap(self) -> float:
        """At most 1. If it is below 0, the two take longer together than one after the other."""
        return min(1 - (self.together_us - self.compute_us) / self.alone_us, 1.0)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "overlap": self.overlap}


def measure(
    collective: str, options: Options, ours: RankSet, peers: dict[Peer, RankSet], warn: Warn
) -> Iterator[list[Overlap]]:
    """Yields, for each size, a result for each engine."""
    engines = Engines(ours, peers, warn)
    for size, case in cases(collective, options):
        opened: dict[str, dict[str, Any]] = {}
        for engine in ["pycomm", *(peer.name for peer in peers)]:
            try:
                opened[engine] = _open(engines.ranks(engine), case, options)
            except SetError as error:
                if engine == "pycomm":
                    raise
                engines.give_up(engine, error)
            else:
                if "error" in opened[engine]:
                    answer, what = opened.pop(engine), f"{engine}, {collective}, {case.dtype}"
                    failure = engine == "pycomm" and "lacks" not in answer
                    warn(NotRun(what, f"{what}: {answer['error']}", failure))
        forms = {engine: [Form(engines.ranks(engine), 0, part) for part in PARTS] for engine in opened}
        _repeat(forms, options, engines)
        found = []
        for engine, parts in forms.items():
            if engines.has(engine):
                blocking, alone, compute, together = (statistics.median(form.found_us) for form in parts)
                form, wrong = opened[engine]["form"], opened[engine]["wrong"]
                found.append(
                    Overlap(
                        collective,
                        size,
                        case.dtype,
                        options.ranks,
                        engine,
                        form,
                        blocking,
                        alone,
                        compute,
                        together,
                        wrong,
                    )
                )
        yield found


def _open(ranks: RankSet, case: Case, options: Options) -> dict[str, Any]:
    way = variant(options.offsets, options.huge)
    answers = ranks.order("open_overlap", case=asdict(case), variant=way, check=options.check)
    failed = [answer for answer in answers if "error" in answer]
    wrong = sum(sum(answer.get("forms", {}).values()) for answer in answers)
    return failed[0] if failed else {**answers[0], "wrong": wrong}


def _repeat(forms: dict[str, list[Form]], options: Options, engines: Engines) -> None:
    order = random.Random(0)

    def prepare(parts: list[Form]) -> Callable[[], None]:
        """Sets the computation to the time of the call alone, and all parts to the same number of calls."""

        def do() -> None:
            blocking, alone, compute, together = parts
            ranks = alone.ranks
            alone.calibrate(options)
            target = statistics.median(alone.run(1, alone.calls, 1)[0] for _ in range(5))
            ranks.order("compute_for", units=100)
            compute.run(1, 10, 1)
            unit = min(compute.run(1, 10, 1)[0] for _ in range(3)) / 100
            ranks.order("compute_for", units=max(1, round(target / unit)))
            for form in (blocking, compute, together):
                form.calls, form.samples, form.warmup = alone.calls, alone.samples, alone.warmup

        return do

    engines.in_turn({engine: [prepare(parts)] for engine, parts in forms.items()}, order)
    turns: dict[str, list[Callable[[], None]]] = {
        engine: [form.repeat for form in parts] for engine, parts in forms.items()
    }
    for _ in range(REPETITIONS[1]):
        engines.in_turn(turns, order)


HEADING = (
    f"{'size':>9}  {'engine':<10} {'form':<12} {'blocking':>9} {'alone':>9} {'compute':>9} {'together':>9}"
    f" {'overlap':>8} {'#wrong':>6}",
    f"{'B':>9}  {'':<10} {'':<12} {'us':>9} {'us':>9} {'us':>9} {'us':>9} {'%':>8}",
)


def line(found: Overlap) -> str:
    us = (found.blocking_us, found.alone_us, found.compute_us, found.together_us)
    return (
        f"{found.bytes:>9}  {found.engine:<10} {found.form.replace('_', ' '):<12}"
        f" {' '.join(f'{time:>9.2f}' for time in us)} {100 * found.overlap:>8.0f} {found.wrong:>6}"
    )
