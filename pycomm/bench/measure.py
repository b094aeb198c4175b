"""Cases, repetitions in turn, and the rows that come out.

Every set of ranks stands ready at once; one runs while the others sleep. Within a repetition each form of
each engine has its turn, in an order that is shuffled anew, so that a machine that grows slower is slower for
all and none always follows the same other. A repetition times many calls in a row; the slowest rank's time
counts.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pycomm.bench.sets import Peer, RankSet, SetError
from pycomm.bench.workers.data import REDUCING, ROOTED, SHAPES, Case, numpy_dtype

COLLECTIVES = tuple(SHAPES)
REPETITION_S = 0.006  # what a repetition of one form aims to take
CASE_S = 3.0  # after this long a case's fewest repetitions are enough
REPETITIONS = (5, 15)
TRACED = (5, 1000)  # calls that are timed one by one
PEER = {"buffers": "plain", "algorithm": None, "persistent": False, "codec": None}  # a peer has one way


@dataclass(frozen=True)
class Options:
    ranks: int
    sizes: Sequence[int]  # bytes of the larger buffer of a rank
    dtype: str = "float32"
    op: str = "sum"
    iterations: int | None = None  # calls in a repetition; by default as many as take a few milliseconds
    warmup: int | None = None
    check: bool = True
    algorithms: Sequence[str | None] = (None,)
    buffers: Sequence[str] = ("plain",)
    persistent: bool = False
    codecs: Sequence[str | None] = (None,)


@dataclass
class Times:
    """Of one form, in microseconds for a call. The median and the minimum are over repetitions, each of many
    calls in a row; p99 and wait are of calls timed one by one after that."""

    median_us: float
    min_us: float
    p99_us: float  # of the slowest rank's time
    wait_us: float  # median of the last rank's entry - the first rank's entry
    wrong: int


@dataclass
class Row:
    collective: str
    bytes: int
    count: int
    dtype: str
    op: str
    ranks: int
    algorithm: str
    buffers: str
    persistent: bool
    forms: dict[str, Times]
    peers: dict[str, float] = field(default_factory=dict)  # median us of the peer's better form
    codec: str | None = None

    @property
    def pycomm_us(self) -> float:
        return min(times.median_us for times in self.forms.values())

    @property
    def way(self) -> str:
        """How pycomm was called: "plain persistent", "plain int8"."""
        return " ".join([self.buffers, *["persistent"] * self.persistent, *filter(None, [self.codec])])

    @property
    def wait_us(self) -> float:
        return min(self.forms.values(), key=lambda times: times.median_us).wait_us

    @property
    def root(self) -> int:
        return 0 if self.collective in ROOTED else -1

    @property
    def ratios(self) -> dict[str, float]:
        return {name: us / self.pycomm_us for name, us in self.peers.items()}

    def algbw(self, us: float) -> float:
        """GB/s, as nccl-tests has it."""
        return self.bytes / us / 1e3 if us else 0.0

    def busbw(self, us: float) -> float:
        n = self.ranks
        factor = {"all_reduce": 2 * (n - 1) / n, "reduce_scatter": (n - 1) / n, "all_gather": (n - 1) / n}
        factor["all_to_all"] = factor["gather"] = factor["scatter"] = (n - 1) / n
        return self.algbw(us) * factor.get(self.collective, 1.0)

    def as_dict(self) -> dict[str, Any]:
        best = min(self.forms, key=lambda form: self.forms[form].median_us)
        return {
            **asdict(self),
            "pycomm_us": self.pycomm_us,
            "in_place": best == "in_place",
            "min_us": self.forms[best].min_us,
            "p99_us": self.forms[best].p99_us,
            "wait_us": self.wait_us,
            "algbw": self.algbw(self.pycomm_us),
            "busbw": self.busbw(self.pycomm_us),
            "wrong": sum(times.wrong for times in self.forms.values()),
            "ratios": self.ratios,
        }


@dataclass
class _Form:
    """One way in which one engine makes the call, and what it took."""

    ranks: RankSet
    number: int
    name: str
    calls: int = 1
    warmup: int = 1
    samples: list[float] = field(default_factory=list)

    def run(self, calls: int, warmup: int) -> float:
        times = self.ranks.order("time", number=self.number, form=self.name, calls=calls, warmup=warmup)
        return float(max(times)) / calls

    def calibrate(self, options: Options) -> None:
        self.calls = options.iterations or 3
        while options.iterations is None:  # the first calls are slow: what they took says too little
            took = self.run(self.calls, 1) * self.calls
            fitting = int(self.calls * REPETITION_S / max(took, 1e-7))
            if took > REPETITION_S / 4:
                self.calls = max(1, fitting)
                break
            self.calls = min(fitting, self.calls * 16) + 1
        self.warmup = options.warmup if options.warmup is not None else max(1, self.calls // 10)

    def times(self, wrong: int) -> Times:
        us = [sample * 1e6 for sample in self.samples]
        calls = max(TRACED[0], min(self.calls, TRACED[1]))
        traces = self.ranks.order("trace", number=self.number, form=self.name, calls=calls)
        entries, exits = (list(zip(*moments, strict=True)) for moments in zip(*traces, strict=True))
        single = sorted(
            max(left - entered for entered, left in zip(*moments, strict=True)) * 1e6
            for moments in zip(entries, exits, strict=True)
        )
        p99 = single[math.ceil(0.99 * len(single)) - 1]
        wait = statistics.median(max(moments) - min(moments) for moments in entries) * 1e6
        return Times(statistics.median(us), min(us), p99, wait, wrong)


def cases(collective: str, options: Options) -> Iterator[tuple[int, Case]]:
    item = numpy_dtype(options.dtype).itemsize
    if collective == "barrier":
        yield 0, Case(collective, 0, options.dtype)
        return
    op = options.op if collective in REDUCING else "sum"
    parts = max(SHAPES[collective](options.ranks))
    # At least one element for each part; what comes out twice is measured once.
    for count in dict.fromkeys(max(size // item // parts, 1) for size in options.sizes):
        yield count * item * parts, Case(collective, count, options.dtype, op)


def measure(
    collective: str,
    options: Options,
    ours: RankSet,
    peers: dict[Peer, RankSet],
    warn: Callable[[str], None],
) -> Iterator[list[Row]]:
    """The rows of each size, as they are done. A peer that fails is named once, and measured no more."""
    for size, case in cases(collective, options):
        yield _measure_case(size, case, options, ours, peers, warn)


def _measure_case(
    size: int,
    case: Case,
    options: Options,
    ours: RankSet,
    peers: dict[Peer, RankSet],
    warn: Callable[[str], None],
) -> list[Row]:
    variants: list[dict[str, Any]] = [
        {"buffers": buffers, "algorithm": algorithm, "persistent": persistent, "codec": codec}
        for algorithm in options.algorithms
        for buffers in options.buffers
        for codec in options.codecs
        for persistent in (
            [False, True]
            if options.persistent and case.collective == "all_reduce" and codec is None
            else [False]
        )
    ]
    opened = _open(ours, case, variants, options.check)
    for variant, answer in zip(variants, opened, strict=True):
        if "error" in answer:
            warn(f"{case.collective}, {_words(variant)}: {answer['error']}")
    forms: dict[tuple[str, int, str], _Form] = {}
    for number, answer in enumerate(opened):
        for name in answer.get("forms", {}):
            forms["pycomm", number, name] = _Form(ours, number, name)
    for peer, ranks in list(peers.items()):
        try:
            answer = _open(ranks, case, [PEER], options.check)[0]
        except SetError as error:
            _give_up(peer, peers, error, warn)
            continue
        if "error" in answer:
            warn(f"{peer.name}: {answer['error']}")
        elif wrong := sum(answer["forms"].values()):
            warn(f"{peer.name}: {wrong} elements of {case.collective} are wrong")
        for name in answer.get("forms", {}):
            forms[peer.name, 0, name] = _Form(ranks, 0, name)
    _repeat(forms, options, peers, warn)

    rows = []
    for number, (variant, answer) in enumerate(zip(variants, opened, strict=True)):
        mine = {
            name: forms["pycomm", number, name].times(wrong)
            for name, wrong in answer.get("forms", {}).items()
        }
        if not mine:
            continue
        row = Row(
            case.collective,
            size,
            case.count,
            case.dtype,
            case.op if case.collective in REDUCING else "none",
            options.ranks,
            answer["algorithm"],
            str(variant["buffers"]),
            bool(variant["persistent"]),
            mine,
            codec=variant["codec"],
        )
        for peer in peers:
            medians = [
                statistics.median(form.samples) * 1e6
                for (name, _, _), form in forms.items()
                if name == peer.name and form.samples
            ]
            if medians:
                row.peers[peer.name] = min(medians)
        rows.append(row)
    return rows


def _repeat(
    forms: dict[tuple[str, int, str], _Form],
    options: Options,
    peers: dict[Peer, RankSet],
    warn: Callable[[str], None],
) -> None:
    failed: set[str] = set()

    def attempt(key: tuple[str, int, str], do: Callable[[], None]) -> None:
        if key[0] in failed:
            return
        try:
            do()
        except SetError as error:
            if key[0] == "pycomm":
                raise
            failed.add(key[0])
            _give_up(next(peer for peer in peers if peer.name == key[0]), peers, error, warn)

    for key, form in forms.items():
        attempt(key, lambda form=form: form.calibrate(options))  # type: ignore[misc]
    fewest, most = REPETITIONS
    order = random.Random(0)
    turns = list(forms.items())
    begin = time.monotonic()
    for repetition in range(most):
        if repetition >= fewest and time.monotonic() - begin > CASE_S:
            break
        order.shuffle(turns)
        for key, form in turns:
            attempt(key, lambda form=form: form.samples.append(form.run(form.calls, form.warmup)))  # type: ignore[misc]


def _open(ranks: RankSet, case: Case, variants: list[dict[str, Any]], check: bool) -> list[dict[str, Any]]:
    """What all ranks together say of each variant."""
    answers = ranks.order("open", case=asdict(case), variants=variants, check=check)
    together = []
    for of_ranks in zip(*answers, strict=True):
        failed = [answer for answer in of_ranks if "error" in answer]
        if failed:
            together.append(failed[0])
            continue
        forms = {name: sum(a["forms"][name] for a in of_ranks) for name in of_ranks[0]["forms"]}
        together.append({"forms": forms, "algorithm": of_ranks[0]["algorithm"]})
    return together


def _give_up(peer: Peer, peers: dict[Peer, RankSet], error: SetError, warn: Callable[[str], None]) -> None:
    warn(f"{peer.name} is left out from here on: {error}")
    peers.pop(peer).close()


def _words(variant: dict[str, Any]) -> str:
    algorithm = variant["algorithm"] or "the default algorithm"
    more = [", persistent"] * variant["persistent"] + [f", codec {variant['codec']}"] * bool(variant["codec"])
    return f"{algorithm}, {variant['buffers']} buffers" + "".join(more)


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Geometric mean and minimum of the ratios, by collective, buffers and peer; where several MPIs were
    measured also against the better of them at each size."""
    groups: dict[tuple[str, str, str, bool, str | None], list[tuple[int, float]]] = {}
    for row in rows:
        ratios = dict(row.ratios)
        mpis = [ratio for name, ratio in ratios.items() if name.startswith(("mpi", "openmpi"))]
        if len(mpis) > 1:
            ratios["better MPI"] = min(mpis)
        for name, ratio in ratios.items():
            key = (row.collective, row.buffers, name, row.persistent, row.codec)
            groups.setdefault(key, []).append((row.bytes, ratio))
    return [
        {
            "collective": collective,
            "buffers": buffers,
            "persistent": persistent,
            "codec": codec,
            "peer": peer,
            "from_bytes": min(size for size, _ in found),
            "to_bytes": max(size for size, _ in found),
            "geometric_mean": math.exp(statistics.fmean(math.log(ratio) for _, ratio in found)),
            "min": min(ratio for _, ratio in found),
            "min_at_bytes": min(found, key=lambda pair: pair[1])[0],
        }
        for (collective, buffers, peer, persistent, codec), found in groups.items()
    ]
