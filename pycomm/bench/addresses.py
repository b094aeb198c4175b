"""A sweep of addresses: the time of a call as a function of how many bytes beyond a page its buffers begin.

All addresses of a size are measured in turn, once per round, in an order that is shuffled for each round. The
time of an address is the lowest quartile over its rounds. Its odd and even rounds are two measurements of the
same address: their difference shows the noise of the machine, not an effect of the address.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pycomm.bench.measure import Engines, Form, Warn, cases, variant
from pycomm.bench.peers import Peer
from pycomm.bench.report import TITLES, human
from pycomm.bench.rows import FORMS, Offsets, Options, percentile, significant
from pycomm.bench.sets import RankSet
from pycomm.bench.workers.data import numpy_dtype

OFFSETS = (0, 4, 16, 32, 48, 60, 63)  # bytes beyond a page: aligned, NumPy's, and those of slices
ROUNDS = 24
BEST = 25  # percentile over the rounds


@dataclass
class Address:
    offsets: Offsets  # those of in and out
    samples_us: list[float] = field(default_factory=list)

    @property
    def us(self) -> float:
        return percentile(self.samples_us, BEST)

    @property
    def halves_us(self) -> tuple[float, float]:
        """The times of the even rounds and of the odd ones."""
        return percentile(self.samples_us[0::2], BEST), percentile(self.samples_us[1::2], BEST)

    @property
    def spread(self) -> float:
        return max(self.halves_us) / min(self.halves_us)


@dataclass
class Sweep:
    """One engine's form of a collective at one size, at all addresses."""

    collective: str
    bytes: int
    dtype: str
    ranks: int
    engine: str
    form: str
    addresses: list[Address]
    wrong: int = 0  # wrong elements, over all addresses

    @property
    def best(self) -> Address:
        return min(self.addresses, key=lambda address: address.us)

    @property
    def worst(self) -> Address:
        return max(self.addresses, key=lambda address: address.us)

    @property
    def worst_over_best(self) -> float:
        return self.worst.us / self.best.us

    @property
    def spread(self) -> float:
        """The largest spread of one address: a ratio of two addresses that is no larger is noise."""
        return max(address.spread for address in self.addresses)

    def as_dict(self) -> dict[str, Any]:
        return {
            "collective": self.collective,
            "bytes": self.bytes,
            "dtype": self.dtype,
            "ranks": self.ranks,
            "engine": self.engine,
            "form": self.form,
            "best_us": self.best.us,
            "worst_us": self.worst.us,
            "worst_at": self.worst.offsets,
            "worst_over_best": self.worst_over_best,
            "spread_of_one_address": self.spread,
            "wrong": self.wrong,
            "addresses": [
                {
                    "offsets": address.offsets,
                    "us": address.us,
                    "halves_us": address.halves_us,
                    "samples_us": [significant(us) for us in address.samples_us],
                }
                for address in self.addresses
            ],
        }


def pairs(offsets: Sequence[int]) -> list[Offsets]:
    """Pairs of offsets of in and out: equal ones, and each with the first."""
    first, *others = offsets
    unequal = [pair for other in others for pair in ((first, other), (other, first))]
    return [*((offset, offset) for offset in offsets), *unequal]


def fitting(dtype: str, offsets: Sequence[int] = OFFSETS) -> list[int]:
    """The offsets that are multiples of the type's alignment."""
    return [offset for offset in offsets if offset % numpy_dtype(dtype).itemsize == 0]


def sweep(
    collective: str,
    options: Options,
    offsets: Sequence[int],
    ours: RankSet,
    peers: dict[Peer, RankSet],
    warn: Warn,
) -> Iterator[list[Sweep]]:
    """Yields, for each size, a sweep for each engine and form."""
    engines = Engines(ours, peers, warn)
    # In place there is only one address.
    ways = [
        variant(pair, options.huge, FORMS if pair[0] == pair[1] else FORMS[:1]) for pair in pairs(offsets)
    ]
    for size, case in cases(collective, options):
        opened = engines.open(case, ways, options.check)
        found = {
            engine: [
                Form(engines.ranks(engine), number, name)
                for number, answer in enumerate(answers)
                for name in answer.get("forms", {})
            ]
            for engine, answers in opened.items()
        }
        _measure(found, options, engines)
        yield [
            Sweep(
                collective,
                size,
                case.dtype,
                options.ranks,
                engine,
                name,
                [Address(ways[form.number]["offsets"], form.found_us) for form in forms if form.name == name],
                sum(answer.get("forms", {}).get(name, 0) for answer in opened[engine]),
            )
            for engine, forms in found.items()
            if engines.has(engine)
            for name in FORMS
            if any(form.name == name for form in forms)
        ]


def _measure(found: Mapping[str, Sequence[Form]], options: Options, engines: Engines) -> None:
    order = random.Random(0)

    def calibrate(forms: Sequence[Form], name: str) -> Callable[[], None]:
        """Calibrates one address for all, so that all make the same number of calls."""

        def do() -> None:
            of = [form for form in forms if form.name == name]
            of[0].calibrate(options)
            for form in of:
                # One sample per round, of a millisecond or more: short samples vary more than addresses do.
                longer = 3 if options.iterations is None and of[0].calls > 1 else 1
                form.samples, form.calls = 1, of[0].calls * longer
                form.warmup = max(1, form.calls // 10) if options.warmup is None else options.warmup

        return do

    if not options.cold:
        todo = {
            engine: [calibrate(forms, name) for name in dict.fromkeys(form.name for form in forms)]
            for engine, forms in found.items()
        }
        engines.in_turn(todo, order)

    def repeat(form: Form) -> Callable[[], None]:
        return lambda: form.repeat(options.cold)

    turns = {engine: [repeat(form) for form in forms] for engine, forms in found.items()}
    for _ in range(ROUNDS):
        engines.in_turn(turns, order)


# ---- for people ----

HEADING = (
    f"{'size':>9}  {'form':<12}  {'engine':<10} {'best':>9} {'worst':>9}  {'at in, out':<10}"
    f" {'worst/best':>10} {'same address':>12} {'#wrong':>6}",
    f"{'B':>9}  {'':<12}  {'':<10} {'us':>9} {'us':>9}",
)


def line(found: Sweep) -> str:
    at = ", ".join(map(str, found.worst.offsets))
    return (
        f"{found.bytes:>9}  {TITLES[found.form]:<12}  {found.engine:<10} {found.best.us:>9.2f} "
        f"{found.worst.us:>9.2f}  {at:<10} {found.worst_over_best:>10.2f} {found.spread:>12.2f}"
        f" {found.wrong:>6}"
    )


def markdown(found: Sequence[Sweep]) -> str:
    """A table for each engine: worst over best address, and in parentheses the spread of one address."""
    lines: list[str] = []
    sizes = sorted({sweep.bytes for sweep in found})
    for engine, ranks, dtype in dict.fromkeys((s.engine, s.ranks, s.dtype) for s in found):
        lines += [
            f"{engine}, {dtype}, {ranks} ranks: the worst address over the best (the same address twice)",
            "",
        ]
        lines.append(f"| collective | form | {' | '.join(map(human, sizes))} |")
        lines.append("|---|---|" + "---:|" * len(sizes))
        of_engine = [s for s in found if (s.engine, s.ranks, s.dtype) == (engine, ranks, dtype)]
        for collective, form in dict.fromkeys((s.collective, s.form) for s in of_engine):
            by_size = {s.bytes: s for s in of_engine if (s.collective, s.form) == (collective, form)}
            cells = [
                f"{s.worst_over_best:.2f} ({s.spread:.2f}){f', {s.wrong} wrong' * bool(s.wrong)}"
                if (s := by_size.get(size))
                else "-"
                for size in sizes
            ]
            lines.append(f"| {collective} | {TITLES[form]} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
