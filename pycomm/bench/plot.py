"""A run's chart: time by size, and the peers' time over pycomm's or, without peers, the bus bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from pycomm.bench.rows import Row

STROKES = {"out_of_place": "-", "in_place": "--"}
Lines = dict[tuple[str, str], list[tuple[int, float]]]  # by label and form


def plot(rows: Sequence[Row], path: str, machine: str) -> None:
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        if row.bytes:
            groups.setdefault((row.collective, row.dtype, row.ranks), []).append(row)
    if not groups:
        raise ValueError("--plot: there is nothing to draw: a barrier has no size")
    columns = 2 if any(row.beside for row in rows) else 1
    size = (6.5 * columns, 4.2 * len(groups))
    figure, axes = plt.subplots(len(groups), columns, figsize=size, squeeze=False)
    for (left, *right), ((collective, dtype, ranks), found) in zip(axes, groups.items(), strict=True):
        title = f"{collective}, {dtype}, {ranks} ranks"
        times, bandwidths, ratios = _lines(found)
        colours = {label: f"C{n}" for n, label in enumerate(dict.fromkeys(label for label, _ in times))}
        if right:
            _draw(left, times, colours, title, "us a call, median")
            _draw(right[0], ratios, colours, "above 1: pycomm is faster", "peer's time / pycomm's")
            right[0].axhline(1, color="black", linewidth=0.8)
        else:
            _draw(left, bandwidths, colours, title, "bus bandwidth, GB/s")
    figure.suptitle(machine, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _lines(rows: Sequence[Row]) -> tuple[Lines, Lines, Lines]:
    """Times, bus bandwidths and ratios. Peers, which have one way, stand beside pycomm's first."""
    times: Lines = {}
    bandwidths: Lines = {}
    ratios: Lines = {}
    algorithms = len({row.algorithm for row in rows if row.bytes == rows[0].bytes}) > 1
    for row in rows:
        ours = f"pycomm, {row.way}" + (f", {row.algorithm}" if algorithms else "")
        for form, of in row.forms.items():
            times.setdefault((ours, form), []).append((row.bytes, of.median_us))
            bandwidths.setdefault((ours, form), []).append((row.bytes, row.busbw(of.median_us)))
        if row.way != rows[0].way or (algorithms and not row.default):
            continue
        for peer, forms in row.beside.items():
            for form, of in forms.items():
                times.setdefault((peer, form), []).append((row.bytes, of.median_us))
            for form, ratio in row.ratios[peer].items():
                ratios.setdefault((peer, form), []).append((row.bytes, ratio))
    return times, bandwidths, ratios


def _draw(axis: Any, lines: Lines, colours: dict[str, str], title: str, unit: str) -> None:
    for (label, form), points in lines.items():
        look = {"color": colours[label], "linestyle": STROKES[form]}
        axis.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=3,
            label=f"{label}, {form.replace('_', ' ')}",
            **look,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel="bytes", ylabel=unit, title=title)
    axis.grid(alpha=0.3)
    if lines:
        axis.legend(fontsize=6)
