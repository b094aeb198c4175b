"""Measures cases by repetitions in turn, and makes rows of them.

All sets of ranks exist at the same time; one runs while the others sleep. Within a repetition each form of
each engine runs once, in an order that is shuffled each time. So a machine that slows down slows all of them,
and no form always follows the same other. A repetition is some samples in a row; a sample times many calls in
a row; the slowest rank's time counts.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pycomm.bench.peers import Peer, SetError
from pycomm.bench.rows import FORMS, MESSAGES, Forms, NotRun, Options, Row, Times, percentile
from pycomm.bench.sets import RankSet
from pycomm.bench.workers.data import POINT_TO_POINT, REDUCING, SHAPES, Case, numpy_dtype

COLLECTIVES = tuple(name for name in SHAPES if name not in POINT_TO_POINT)
SAMPLE_S = 0.0004  # the least duration of a sample: many calls at small sizes, one at large
REPETITION_S = 0.006  # the intended duration of a repetition of one form
CASE_S = 3.0  # after this time a case ends with the least number of repetitions
REPETITIONS = (5, 15)
TRACED = (5, 1000)  # least and most calls that are timed one by one

Variant = dict[str, Any]
Warn = Callable[[str | NotRun], None]


@dataclass
class Form:
    """One way in which one engine makes the call, and its times."""

    ranks: RankSet
    number: int
    name: str
    messages: int = 1  # per call
    calls: int = 1  # per sample
    samples: int = 1  # per repetition
    warmup: int = 1
    found_us: list[float] = field(default_factory=list)

    def run(self, samples: int, calls: int, warmup: int) -> list[float]:
        """Seconds per message."""
        order = {
            "number": self.number,
            "form": self.name,
            "samples": samples,
            "calls": calls,
            "warmup": warmup,
        }
        of_ranks = self.ranks.order("time", **order)
        return [max(times) / calls / self.messages for times in zip(*of_ranks, strict=True)]

    def repeat(self, cold: bool = False) -> None:
        if cold:
            of_ranks = self.ranks.order("time_cold", number=self.number, form=self.name)
            found = [max(times) / self.messages for times in zip(*of_ranks, strict=True)]
        else:
            found = self.run(self.samples, self.calls, self.warmup)
        self.found_us += [seconds * 1e6 for seconds in found]

    def calibrate(self, options: Options) -> None:
        calls = 3
        while True:  # the first calls are slow, so their time says too little
            took = self.run(1, calls, 1)[0] * self.messages * calls
            a_call = max(took, 1e-7) / calls
            if took > REPETITION_S / 4:
                break
            calls = min(int(REPETITION_S / a_call), calls * 16) + 1
        self.calls = options.iterations or max(1, round(SAMPLE_S / a_call))
        most = max(1, round(REPETITION_S / SAMPLE_S))
        self.samples = min(max(1, int(REPETITION_S / (self.calls * a_call))), most)
        self.warmup = (
            options.warmup if options.warmup is not None else max(1, self.calls * self.samples // 10)
        )

    def times(self, wrong: int, cold: bool = False) -> Times:
        if cold:
            return Times(self.found_us, wrong)
        calls = max(TRACED[0], min(self.calls * self.samples, TRACED[1]))
        traces = self.ranks.order("trace", number=self.number, form=self.name, calls=calls)
        entries, exits = (list(zip(*moments, strict=True)) for moments in zip(*traces, strict=True))
        single = [
            max(left - entered for entered, left in zip(*moments, strict=True)) * 1e6 / self.messages
            for moments in zip(entries, exits, strict=True)
        ]
        wait = statistics.median(max(moments) - min(moments) for moments in entries) * 1e6
        return Times(self.found_us, wrong, statistics.median(single), percentile(single, 99), wait)


class Engines:
    """The sets of ranks that are measured in turn: pycomm's own, which must not fail, and those of peers,
    which are dropped when they fail."""

    def __init__(self, ours: RankSet, peers: dict[Peer, RankSet], warn: Warn) -> None:
        self.ours = ours
        self.peers = peers
        self.warn = warn

    def open(self, case: Case, variants: Sequence[Variant], check: bool) -> dict[str, list[dict[str, Any]]]:
        """Each engine's answers about the variants, by "pycomm" (our own) and the peers' names. Peers other
        than pycomm have one variant: they are told only where the buffers lie."""
        answers = {"pycomm": _open(self.ours, case, variants, check)}
        for variant, answer in zip(variants, answers["pycomm"], strict=True):
            if "error" in answer:
                what = f"{case.collective}, {case.dtype}, {_words(variant)}"
                self.warn(NotRun(what, f"{what}: {answer['error']}", failure="lacks" not in answer))
        for peer, ranks in list(self.peers.items()):
            theirs = list(variants) if peer.kind_name == "pycomm" else _of_peers(variants)
            try:
                answers[peer.name] = _open(ranks, case, theirs, check)
            except SetError as error:
                self.give_up(peer.name, error)
                continue
            for answer in answers[peer.name]:
                if "error" in answer:
                    what = f"{peer.name}, {case.collective}, {case.dtype}"
                    self.warn(NotRun(what, f"{peer.name}: {answer['error']}"))
                elif wrong := sum(answer["forms"].values()):
                    self.warn(f"{peer.name}: {wrong} elements of {case.collective} are wrong")
        return answers

    def ranks(self, name: str) -> RankSet:
        return self.ours if name == "pycomm" else self.peers[self._peer(name)]

    def in_turn(self, todo: Mapping[str, Sequence[Callable[[], None]]], order: random.Random) -> None:
        """Does each thing once, in a shuffled order. A peer that fails is dropped."""
        turns = [(name, do) for name, of_engine in todo.items() for do in of_engine]
        order.shuffle(turns)
        gone: set[str] = set()
        for name, do in turns:
            if name in gone or not self.has(name):
                continue
            try:
                do()
            except SetError as error:
                if name == "pycomm":
                    raise
                gone.add(name)
                self.give_up(name, error)

    def has(self, name: str) -> bool:
        return name == "pycomm" or any(peer.name == name for peer in self.peers)

    def give_up(self, name: str, error: SetError) -> None:
        self.warn(NotRun(name, f"{name} is left out from here on: {error}"))
        self.peers.pop(self._peer(name)).close()

    def _peer(self, name: str) -> Peer:
        return next(peer for peer in self.peers if peer.name == name)


def cases(collective: str, options: Options) -> Iterator[tuple[int, Case]]:
    item = numpy_dtype(options.dtype).itemsize
    if collective == "barrier":
        yield 0, Case(collective, 0, options.dtype)
        return
    op = options.op if collective in REDUCING else "sum"
    parts = max(SHAPES[collective](options.ranks))
    # At least one element for each part; equal counts are measured once.
    for count in dict.fromkeys(max(size // item // parts, 1) for size in options.sizes):
        yield count * item * parts, Case(collective, count, options.dtype, op)


def variants(collective: str, options: Options) -> list[Variant]:
    """The ways in which pycomm is called."""
    return [
        variant(options.offsets, options.huge)
        | {"buffers": buffers, "algorithm": algorithm, "persistent": persistent, "codec": codec}
        for algorithm in options.algorithms
        for buffers in options.buffers
        for codec in options.codecs
        for persistent in (
            [False, True] if options.persistent and collective == "all_reduce" and codec is None else [False]
        )
    ]


def variant(
    offsets: tuple[int, int] | None = None, huge: bool = False, forms: Sequence[str] = FORMS
) -> Variant:
    """The variant that every engine has."""
    return {
        "buffers": "plain",
        "algorithm": None,
        "persistent": False,
        "codec": None,
        "offsets": offsets,
        "huge": huge,
        "forms": list(forms),
    }


def measure(
    collective: str, options: Options, ours: RankSet, peers: dict[Peer, RankSet], warn: Warn
) -> Iterator[list[Row]]:
    """Yields the rows of each size as they are measured. A peer that fails is reported once, then dropped."""
    engines = Engines(ours, peers, warn)
    for size, case in cases(collective, options):
        yield _measure_case(size, case, options, engines)


def _measure_case(size: int, case: Case, options: Options, engines: Engines) -> list[Row]:
    ways = variants(case.collective, options)
    opened = engines.open(case, ways, options.check)
    messages = MESSAGES.get(case.collective, 1)
    forms: dict[str, dict[tuple[int, str], Form]] = {
        engine: {
            (number, name): Form(engines.ranks(engine), number, name, messages)
            for number, answer in enumerate(answers)
            for name in answer.get("forms", {})
        }
        for engine, answers in opened.items()
    }
    _repeat(forms, options, engines)
    times: dict[str, dict[tuple[int, str], Times]] = {}
    for engine, found in forms.items():
        for (number, name), form in found.items():

            def trace(
                engine: str = engine, number: int = number, name: str = name, form: Form = form
            ) -> None:
                wrong = opened[engine][number]["forms"][name]
                times.setdefault(engine, {})[number, name] = form.times(wrong, options.cold)

            engines.in_turn({engine: [trace]}, random.Random(0))

    rows = []
    for number, (way, answer) in enumerate(zip(ways, opened["pycomm"], strict=True)):
        if "error" in answer:
            continue
        row = Row(
            case.collective,
            size,
            case.count,
            case.dtype,
            case.op if case.collective in REDUCING else "none",
            options.ranks,
            answer["algorithm"],
            way["buffers"],
            way["persistent"],
            _of(times["pycomm"], number),
            codec=way["codec"],
            forced=way["algorithm"] is not None,
            default=answer["algorithm"] == answer["default"],
            offsets=way["offsets"],
        )
        for peer in engines.peers:
            beside = _of(times.get(peer.name, {}), number if peer.kind_name == "pycomm" else 0)
            if beside:
                row.beside[peer.name] = beside
        rows.append(row)
    _mark_fastest(rows)
    return rows


def _of(times: Mapping[tuple[int, str], Times], number: int) -> Forms:
    return {name: found for (of, name), found in times.items() if of == number}


def _mark_fastest(rows: Sequence[Row]) -> None:
    """Marks the fastest algorithm of each way of calling, if there are several."""
    for row in rows:
        rivals = [other for other in rows if other.way == row.way]
        if len(rivals) > 1:
            row.fastest = [
                form
                for form, times in row.forms.items()
                if times.median_us
                <= min(other.forms[form].median_us for other in rivals if form in other.forms)
            ]


def _repeat(forms: Mapping[str, Mapping[Any, Form]], options: Options, engines: Engines) -> None:
    order = random.Random(0)
    if not options.cold:
        calibrations = {
            engine: [lambda form=form: form.calibrate(options) for form in found.values()]
            for engine, found in forms.items()
        }
        engines.in_turn(calibrations, order)
    turns = {
        engine: [lambda form=form: form.repeat(options.cold) for form in found.values()]
        for engine, found in forms.items()
    }
    fewest, most = REPETITIONS
    begin = time.monotonic()
    for repetition in range(most):
        if repetition >= fewest and time.monotonic() - begin > CASE_S:
            break
        engines.in_turn(turns, order)


def _open(ranks: RankSet, case: Case, variants: Sequence[Variant], check: bool) -> list[dict[str, Any]]:
    """The combined answers of all ranks about each variant."""
    answers = ranks.order("open", case=asdict(case), variants=list(variants), check=check)
    together = []
    for of_ranks in zip(*answers, strict=True):
        failed = [answer for answer in of_ranks if "error" in answer]
        if failed:
            together.append(failed[0])
            continue
        forms = {name: sum(a["forms"][name] for a in of_ranks) for name in of_ranks[0]["forms"]}
        together.append({**of_ranks[0], "forms": forms})
    return together


def _of_peers(variants: Sequence[Variant]) -> list[Variant]:
    """The variants of engines other than pycomm, which differ only in where the buffers lie."""
    asked = [variant(way["offsets"], way["huge"], way["forms"]) for way in variants]
    return [way for number, way in enumerate(asked) if way not in asked[:number]]


def _words(variant: Variant) -> str:
    algorithm = variant["algorithm"] or "the default algorithm"
    more = [", persistent"] * variant["persistent"] + [f", codec {variant['codec']}"] * bool(variant["codec"])
    return f"{algorithm}, {variant['buffers']} buffers" + "".join(more)
