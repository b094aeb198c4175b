"""What is requested, what was measured, and what follows from it: bandwidths, ratios, their means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pycomm.bench.workers.data import ROOTED, WINDOW

FORMS = ("out_of_place", "in_place")
Offsets = tuple[int, int]
# Calls that pass several messages; times are per message.
MESSAGES = {"ping_pong": 2, "one_way": WINDOW, "two_way": WINDOW}
BETTER_MPI = "better MPI"


@dataclass(frozen=True)
class Options:
    ranks: int
    sizes: Sequence[int]  # bytes of the larger buffer of a rank
    dtype: str = "float32"
    op: str = "sum"
    iterations: int | None = None  # calls in a sample; by default enough to be timed
    warmup: int | None = None
    check: bool = True
    algorithms: Sequence[str | None] = (None,)
    buffers: Sequence[str] = ("plain",)
    persistent: bool = False
    codecs: Sequence[str | None] = (None,)
    offsets: Offsets | None = None  # bytes beyond a page of in and out; None: anywhere
    huge: bool = False
    cold: bool = False


@dataclass(frozen=True)
class NotRun:
    """A request that could not be run: its name, and the reason."""

    what: str
    why: str
    failure: bool = False  # pycomm has such a call, and refused it or failed

    def __str__(self) -> str:
        return self.why


@dataclass
class Times:
    """Times of one form, in microseconds. A sample is the time per call of the slowest rank, over enough
    calls in a row to take a good part of a millisecond. Median, minimum and p99 are those of all samples."""

    samples_us: list[float]
    wrong: int = 0
    # Those of calls timed one by one afterwards; None for cold calls, whose samples are single calls.
    call_median_us: float | None = None
    call_p99_us: float | None = None
    wait_us: float | None = None  # median of the last rank's entry - the first rank's entry

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples_us)

    @property
    def min_us(self) -> float:
        return min(self.samples_us)

    @property
    def p99_us(self) -> float:
        return percentile(self.samples_us, 99)

    def as_dict(self) -> dict[str, Any]:
        figures = {"median_us": self.median_us, "min_us": self.min_us, "p99_us": self.p99_us}
        singles = {name: getattr(self, name) for name in ("call_median_us", "call_p99_us", "wait_us")}
        return {
            **figures,
            **singles,
            "wrong": self.wrong,
            "samples_us": [significant(us) for us in self.samples_us],
        }


Forms = dict[str, Times]


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
    forms: Forms
    beside: dict[str, Forms] = field(default_factory=dict)  # the peers' forms, by peer
    codec: str | None = None
    forced: bool = False  # whether the algorithm was requested
    default: bool = True  # whether it is the library's choice
    fastest: Sequence[str] = ()  # the forms in which no other algorithm was faster
    offsets: Offsets | None = None
    cores: tuple[int, int] | None = None  # those of the two ranks, if pairs of cores are compared

    @property
    def pycomm_us(self) -> float:
        return _better(self.forms)

    @property
    def way(self) -> str:
        """How pycomm was called: "plain persistent", "plain int8"."""
        return " ".join([self.buffers, *["persistent"] * self.persistent, *filter(None, [self.codec])])

    @property
    def root(self) -> int:
        return 0 if self.collective in ROOTED else -1

    @property
    def wrong(self) -> int:
        return sum(times.wrong for times in self.forms.values())

    @property
    def ratios(self) -> dict[str, dict[str, float]]:
        """Each peer's time divided by pycomm's, out of place by out of place and in place by in place."""
        return {
            peer: {
                form: forms[form].median_us / us.median_us for form, us in self.forms.items() if form in forms
            }
            for peer, forms in self.beside.items()
        }

    def algbw(self, us: float) -> float:
        """GB/s, as in nccl-tests."""
        return self.bytes / us / 1e3 if us else 0.0

    def busbw(self, us: float) -> float:
        n = self.ranks
        parts = ("reduce_scatter", "all_gather", "all_to_all", "gather", "scatter")
        factor = {"all_reduce": 2 * (n - 1) / n, "two_way": 2, **dict.fromkeys(parts, (n - 1) / n)}
        return self.algbw(us) * factor.get(self.collective, 1.0)

    def as_dict(self) -> dict[str, Any]:
        best = min(self.forms, key=lambda form: self.forms[form].median_us)
        plain = {name: value for name, value in vars(self).items() if name not in ("forms", "beside")}
        return {
            **plain,
            "fastest": list(self.fastest),
            "pycomm_us": self.pycomm_us,
            "in_place": best == "in_place",
            "algbw": self.algbw(self.pycomm_us),
            "busbw": self.busbw(self.pycomm_us),
            "wrong": self.wrong,
            "forms": {name: times.as_dict() for name, times in self.forms.items()},
            "peers": {peer: _better(forms) for peer, forms in self.beside.items()},
            "peer_forms": {
                peer: {name: times.as_dict() for name, times in forms.items()}
                for peer, forms in self.beside.items()
            },
            "ratios": self.ratios,
        }


@dataclass(frozen=True)
class Summary:
    """Geometric mean and minimum of the ratios of one form over the sizes."""

    geometric_mean: float
    min: float
    min_at_bytes: int


def summarize(rows: Sequence[Row], mpis: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The ratios over all sizes, grouped by everything else and separately for each form; if several MPIs
    were measured, also against the better of them at each size."""
    groups: dict[tuple[Any, ...], dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        for name, ratios in with_better_mpi(row, mpis).items():
            algorithm = row.algorithm if row.forced else "default"
            key = (row.collective, row.dtype, row.ranks, algorithm, row.way, name)
            for form, ratio in ratios.items():
                groups.setdefault(key, {}).setdefault(form, []).append((row.bytes, ratio))
    names = ("collective", "dtype", "ranks", "algorithm", "buffers", "peer")
    return [
        {
            **dict(zip(names, key, strict=True)),
            "from_bytes": min(size for found in forms.values() for size, _ in found),
            "to_bytes": max(size for found in forms.values() for size, _ in found),
            "forms": {form: asdict(_summary(found)) for form, found in forms.items()},
        }
        for key, forms in groups.items()
    ]


def with_better_mpi(row: Row, mpis: Sequence[str]) -> dict[str, dict[str, float]]:
    """The row's ratios and, if there are several MPIs, those to the better one in each form."""
    ratios = dict(row.ratios)
    found = [ratios[name] for name in mpis if name in ratios]
    if len(found) > 1:
        ratios[BETTER_MPI] = {
            form: min(of[form] for of in found if form in of)
            for form in FORMS
            if any(form in of for of in found)
        }
    return ratios


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that is not below `percent` percent of the values."""
    return sorted(values)[max(math.ceil(percent / 100 * len(values)), 1) - 1]


def significant(value: float) -> float:
    return float(f"{value:.5g}")


def _better(forms: Forms) -> float:
    return min(times.median_us for times in forms.values())


def _summary(found: Sequence[tuple[int, float]]) -> Summary:
    size, least = min(found, key=lambda pair: pair[1])
    return Summary(math.exp(statistics.fmean(math.log(ratio) for _, ratio in found)), least, size)
