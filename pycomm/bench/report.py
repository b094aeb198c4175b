"""The results for people: a line for each engine at each size, printed as soon as it is measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from pycomm import _native
from pycomm.bench.rows import BETTER_MPI, FORMS, Forms, Options, Row, Times, summarize
from pycomm.bench.workers.data import POINT_TO_POINT, REDUCING, ROOTED

WIDTH = 100
TITLES = {"out_of_place": "out of place", "in_place": "in place"}


@dataclass(frozen=True)
class Column:
    unit: str
    width: int
    cell: Callable[[Row, Times, float | None], str]


def _us(us: float | None) -> str:
    """Microseconds with five digits or more."""
    if us is None:
        return "-"
    return f"{us:.2f}" if us < 1000 else f"{us:.1f}" if us < 1e6 else f"{us:.0f}"


def _gbs(gbs: float) -> str:
    return f"{gbs:.2f}" if gbs >= 1 else f"{gbs:.4f}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x" if ratio < 100 else f"{ratio:.0f}x"


COLUMNS = {  # for each form, by the names for --columns
    "time": Column("us", 9, lambda row, times, ratio: _us(times.median_us)),
    "min": Column("us", 9, lambda row, times, ratio: _us(times.min_us)),
    "p99": Column("us", 9, lambda row, times, ratio: _us(times.p99_us)),
    "call": Column("us", 9, lambda row, times, ratio: _us(times.call_median_us)),
    "call99": Column("us", 9, lambda row, times, ratio: _us(times.call_p99_us)),
    "wait": Column("us", 8, lambda row, times, ratio: _us(times.wait_us)),
    "algbw": Column("GB/s", 7, lambda row, times, ratio: _gbs(row.algbw(times.median_us))),
    "busbw": Column("GB/s", 7, lambda row, times, ratio: _gbs(row.busbw(times.median_us))),
    "ratio": Column("", 8, lambda row, times, ratio: _ratio(ratio)),
}


def default_columns(peers: bool, few: bool = False) -> list[str]:
    """`few`: without the bandwidth that follows from size and time."""
    bandwidth, last = ("busbw", "ratio") if peers else ("algbw", "busbw")
    return ["time", last] if few else ["time", bandwidth, last]


class Table:
    """A table of one collective, type and world size: `heading`, then `lines` for the rows of each size."""

    def __init__(
        self,
        collective: str,
        options: Options,
        peers: Sequence[str] = (),
        columns: Sequence[str] = (),
        largest: tuple[int, int] = (0, 0),
        width: int = WIDTH,
    ) -> None:
        """`largest`: the largest size in bytes, and count. `width`: that of the terminal. If not everything
        fits, the count is left out; then ways of calling get lines of their own; then a bandwidth is left
        out; and at last long names get lines of their own, too."""
        self._collective = collective
        self._options = options
        self._several = len(options.algorithms) > 1
        names = [*options.algorithms]
        if None in names:
            names += [] if collective in POINT_TO_POINT else _native.algorithms(collective)
        ways = [*options.buffers, *options.codecs, "persistent" if options.persistent else ""]
        name = max(len(str(name).rpartition(":")[2]) for name in names) + self._several
        way = max(len(_short(way or "")) for way in ways) + len(" persistent") * options.persistent
        least = max(*(len(peer) + 2 for peer in (*peers, "")), len("algorithm"))
        self._size, count = (max(len(str(n)), 6) for n in largest)
        self._forms = [form for form in FORMS if form == "out_of_place" or _has_in_place(collective)]
        shown, fewer = (columns or default_columns(bool(peers), few) for few in (False, True))
        together, apart = max(name + way, least), max(name, way, least)
        for self._count, self._way_above, self._name, found in (
            (count, False, together, shown),
            (0, False, together, shown),
            (0, True, apart, shown),
            (0, True, apart, fewer),
        ):
            self._columns = {name: COLUMNS[name] for name in found}
            self._form_width = sum(column.width + 1 for column in self._columns.values()) + self._several
            too_wide = self._width() - min(width, WIDTH)
            if too_wide <= 0:
                return
        self._name = max(self._name - too_wide, len("algorithm"))

    def _width(self) -> int:
        count = self._count + 1 if self._count else 0
        return self._size + count + 2 + self._name + self._form_width * len(self._forms) + 7

    def heading(self) -> list[str]:
        titles, names, units = (
            [""] * 3,
            [*self._lead("size", "count", "algorithm")],
            [*self._lead("B", "", "")],
        )
        titles = [" " * len("".join(names))]
        for form in self._forms:
            titles.append(f" {TITLES[form]} ".center(self._form_width - 2, "-").rjust(self._form_width))
            for name, column in self._columns.items():
                names.append(f"{name:>{column.width + 1}}")
                units.append(f"{column.unit:>{column.width + 1}}")
            names.append(" " * self._several)
            units.append(" " * self._several)
        names.append(" #wrong")
        marks = ["* the library's choice, + the fastest"] if self._several else []
        return [self._title(), *marks, "", *("".join(parts).rstrip() for parts in (titles, names, units))]

    def _title(self) -> str:
        o = self._options
        parts = [self._collective, o.dtype]
        if self._collective in REDUCING:
            parts.append(o.op)
        if self._collective in ROOTED:
            parts.append("root 0")
        parts.append(f"{o.ranks} rank{'s' * (o.ranks > 1)}")
        if o.offsets is not None:
            parts.append(f"buffers {o.offsets[0]} and {o.offsets[1]} bytes beyond a page")
        parts += ["huge pages"] * o.huge + ["caches flushed before each call"] * o.cold
        return ", ".join(parts)

    def lines(self, rows: Sequence[Row]) -> list[str]:
        found = []
        for row in rows:
            name = row.algorithm + "*" * (self._several and row.default)
            figures = self._figures(row, row.forms, {})
            found += self._line(str(row.bytes), str(row.count), name, _short(row.way), figures)
            for peer, forms in row.beside.items():
                figures = self._figures(row, forms, row.ratios[peer], peer=True)
                found += self._line("", "", f"  {peer}", "", figures)
        return found

    def _line(self, size: str, count: str, name: str, way: str, figures: str) -> list[str]:
        """The line, and one above it for a name that does not fit its column."""
        above, name = (way.strip(), name) if self._way_above else ("", name + way)
        if len(name) > self._name:
            above, name = f"{name} {above}".rstrip(), ""
        lines = [self._lead("", "", above)] if above else []
        return ["".join(lead).rstrip() for lead in lines] + ["".join(self._lead(size, count, name)) + figures]

    def _lead(self, size: str, count: str, name: str) -> list[str]:
        counted = [f" {count:>{self._count}}"] if self._count else []
        return [f"{size:>{self._size}}", *counted, f"  {name:<{self._name}}"]

    def _figures(self, row: Row, forms: Forms, ratios: dict[str, float], *, peer: bool = False) -> str:
        parts = []
        for form in self._forms:
            times = forms.get(form)
            for name, column in self._columns.items():
                text = column.cell(row, times, ratios.get(form)) if times else "-" if name == "time" else ""
                parts.append(f"{text:>{column.width + 1}}")
            if self._several:
                parts.append("+" if not peer and form in row.fastest else " ")
        wrong = sum(times.wrong for times in forms.values()) if self._options.check else "-"
        parts.append(f" {wrong:>6}")
        return "".join(parts)


def _short(way: str) -> str:
    """The way of calling without its default parts."""
    return "".join(f" {word}" for word in way.split() if word != "plain")


def _has_in_place(collective: str) -> bool:
    return collective not in ("barrier", "send_recv", *POINT_TO_POINT)


def engines(ranks: int, versions: dict[str, str]) -> str:
    peers = [f"{version} ({name})" for name, version in versions.items() if name != "pycomm"]
    return f"{ranks} rank{'s' * (ranks > 1)}" + (f", beside {', '.join(peers)}" if peers else "")


def print_summary(console: Console, rows: Sequence[Row], mpis: Sequence[str]) -> None:
    summary = summarize(rows, mpis)
    if not summary:
        return
    shown = RichTable(
        title="peer's time over pycomm's: geometric mean, and the least with its size",
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    of_group = ("collective", "dtype", "ranks", "algorithm", "buffers")
    names = [name for name in of_group if len({found[name] for found in summary}) > 1] or ["collective"]
    shown.add_column("peer", overflow="fold")  # names give way to numbers
    for form in FORMS:
        shown.add_column(TITLES[form], justify="right", no_wrap=True)
        shown.add_column("least", justify="right", no_wrap=True)
    group = ""
    for found in summary:
        if group != (group := ", ".join(str(found[name]) for name in names)):
            shown.add_row(group)
        cells = [f"  {found['peer']}"]
        for form in FORMS:
            of = found["forms"].get(form)
            cells += (
                [f"{of['geometric_mean']:.2f}x", f"{of['min']:.2f}x at {human(of['min_at_bytes'])}"]
                if of
                else ["-", ""]
            )
        shown.add_row(*cells, style="bold" if found["peer"] == BETTER_MPI else None)
    console.print(shown)


def averages(rows: Sequence[Row]) -> list[str]:
    """The averages of a table, as in nccl-tests: the mean over sizes and forms, for each way of calling."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.bytes:
            way = (row.algorithm if row.forced else "the library's choice") + _short(row.way)
            found.setdefault(way, []).extend(row.busbw(times.median_us) for times in row.forms.values())
    return [
        f"average bus bandwidth {statistics.fmean(gbs):.3f} GB/s" + f", {way}" * (len(found) > 1)
        for way, gbs in found.items()
    ]


def closing(wrong: int, checked: bool, not_run: Sequence[str] = (), failed: bool = False) -> str:
    """The last line, as in nccl-tests, with what could not be run."""
    found = f"{wrong} wrong" if checked else "not checked"
    if not_run:
        found += f", {len(not_run)} not run ({listed(not_run)})"
    verdict = ": FAILED" if failed else ": OK" if checked else ""
    return found + verdict


def listed(names: Sequence[str], most: int = 3) -> str:
    more = f"; and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more


def markdown(rows: Sequence[Row], mpis: Sequence[str]) -> str:
    """A table of ratios by size for each collective and way of calling, out of place | in place."""
    from pycomm.bench.rows import with_better_mpi

    lines: list[str] = []
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        algorithm = f", {row.algorithm}" if row.forced else ""
        key = (row.collective, row.dtype, row.ranks, f"{row.way} buffers{algorithm}")
        groups.setdefault(key, []).append(row)
    for (collective, dtype, ranks, way), found in groups.items():
        ratios = [with_better_mpi(row, mpis) for row in found]
        peers = list(dict.fromkeys(peer for of in ratios for peer in of))
        if BETTER_MPI in peers:
            peers = [BETTER_MPI, *(peer for peer in peers if peer != BETTER_MPI and peer not in mpis)]
        head = ["size", *(f"us, {title}" for title in TITLES.values())]
        head += [f"{peer}, {title}" for peer in peers for title in TITLES.values()]
        lines += [f"{collective}, {dtype}, {ranks} ranks, {way}", "", "| " + " | ".join(head) + " |"]
        lines.append("|" + "---:|" * len(head))
        for row, of in zip(found, ratios, strict=True):
            cells = [human(row.bytes)]
            cells += [_us(row.forms[form].median_us) if form in row.forms else "-" for form in FORMS]
            cells += [_ratio(of.get(peer, {}).get(form)) or "-" for peer in peers for form in FORMS]
            lines.append("| " + " | ".join(cells) + " |")
        means = ["geometric mean", "", ""]
        found_means = {s["peer"]: s["forms"] for s in summarize(found, mpis)}
        for peer in peers:
            for form in FORMS:
                of_form = found_means[peer].get(form)
                means.append(f"**{of_form['geometric_mean']:.2f}x**" if of_form else "-")
        if peers:
            lines.append("| " + " | ".join(means) + " |")
        lines.append("")
    return "\n".join(lines)


def human(size: int) -> str:
    """1024 -> 1 KiB; a size that is no whole number of a unit stays in bytes."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << shift and size % (1 << shift) == 0:
            return f"{size >> shift} {unit}"
    return f"{size} B"
