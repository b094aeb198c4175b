"""pytest-benchmark of the collectives at users' addresses:
`pytest bench/test_bench_addresses.py --benchmark-only -k "all_reduce and 64KiB"`.

The sweep of `pycomm bench all --offsets all -b 4K -e 16M -d uint8`: all addresses of a size in turn,
shuffled, in each of the rounds. It runs once for a collective and size; pytest-benchmark shows its samples (a
call's time by the slower of two ranks) for each address. `extra_info` has the lowest quartile, the same
address measured as two halves, and the worst address over the best.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pycomm.bench import addresses
from pycomm.bench.measure import COLLECTIVES
from pycomm.bench.rows import FORMS, Offsets, Options
from pycomm.bench.sets import RankSet

RANKS = 2
DTYPE = "uint8"  # it may lie at any byte
SIZES = {f"{kib}KiB": kib << 10 for kib in (4, 16, 64, 256, 1024, 4096, 16384)}
PAIRS = addresses.pairs(addresses.fitting(DTYPE))
CASES = [
    (collective, size, form, pair)
    for collective in COLLECTIVES
    for size in SIZES
    for form in FORMS
    for pair in PAIRS
    if collective != "barrier"
    and (form == "out_of_place" or (pair[0] == pair[1] and collective != "send_recv"))
]


class Clock:
    """A clock that advances by the time that the ranks measured for a call."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, us: float) -> None:
        self.now += us * 1e-6


clock = Clock()


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankSet]:
    with RankSet.of_pycomm(RANKS) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def sweeps() -> dict[tuple[str, str], list[addresses.Sweep]]:
    return {}


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(
    ("collective", "size", "form", "pair"),
    CASES,
    ids=lambda of: "-".join(map(str, of)) if isinstance(of, tuple) else of,
)
def test_address(
    benchmark: Any,
    ranks: RankSet,
    sweeps: dict[tuple[str, str], list[addresses.Sweep]],
    collective: str,
    size: str,
    form: str,
    pair: Offsets,
) -> None:
    if (collective, size) not in sweeps:
        options = Options(RANKS, [SIZES[size]], DTYPE)
        offsets = addresses.fitting(DTYPE)

        def fail(why: object) -> None:
            pytest.fail(str(why))

        [sweeps[collective, size]] = addresses.sweep(collective, options, offsets, ranks, {}, fail)
    sweep = next(found for found in sweeps[collective, size] if found.form == form)
    address = next(found for found in sweep.addresses if found.offsets == pair)
    benchmark.group = f"{collective}, {size}, {form.replace('_', ' ')}"
    benchmark.extra_info |= {
        "best quartile, us": address.us,
        "as two halves, us": address.halves_us,
        "worst address / best": sweep.worst_over_best,
        "one address, worst half / best": sweep.spread,
    }
    samples = iter(address.samples_us)
    benchmark.pedantic(lambda: clock.advance(next(samples)), rounds=len(address.samples_us))
