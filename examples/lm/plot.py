"""The demo's chart: loss curves and their difference on the left, bandwidth on the right, a step below."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pycomm import trace

from .bandwidth import Bandwidth, human

matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
matplotlib.rcParams.update({"grid.alpha": 0.25, "legend.frameon": False, "font.size": 9})

STYLES = {
    "pycomm, symmetric": {"color": "#c2410c", "marker": "o"},
    "pycomm, plain": {"color": "#f59e0b", "marker": "o"},
    "MPI": {"color": "#475569", "marker": "s"},
    "Gloo": {"color": "#94a3b8", "marker": "^"},
}


def draw(losses: dict[str, list[float]], bandwidth: Bandwidth, step: list[trace.Step], path: Path) -> None:
    """`losses`: those of two runs, by label. `step`: one step, as each rank saw it."""
    figure = Figure(figsize=(12, 6 + 0.6 * len(step)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(5, 1 + 0.6 * len(step)))
    left, right = above.subfigures(1, 2)
    loss, difference = left.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    right_axes = right.subplots()

    (one, one_losses), (many, many_losses) = losses.items()
    steps = np.arange(1, len(one_losses) + 1)
    loss.plot(steps, one_losses, color="#fdba74", linewidth=5, label=one)
    loss.plot(steps, many_losses, color="#1e293b", linewidth=1, label=many)
    gap = np.abs(np.subtract(one_losses, many_losses))
    loss.set(
        title=f"Training loss, same global batch: at most {gap.max():.1g} apart", ylabel="loss, nats per byte"
    )
    loss.legend()
    difference.plot(steps, np.where(gap > 0, gap, np.nan), ".", color="#1e293b", markersize=3)
    difference.set(yscale="log", xlabel="step", ylabel="|difference|")
    difference.text(
        0.01,
        0.85,
        "not drawn where 0",
        transform=difference.transAxes,
        fontsize=7,
        color="#64748b",
    )

    for contender in bandwidth.microseconds:
        busbw = bandwidth.busbw(contender)
        right_axes.plot(list(busbw), list(busbw.values()), label=contender, markersize=4, **STYLES[contender])
    right_axes.set_xscale("log", base=2)
    right_axes.set_yscale("log")
    right_axes.xaxis.set_major_formatter(human)
    right_axes.set(
        title=f"all_reduce, float32 sum, {bandwidth.ranks} ranks", xlabel="size", ylabel="bus bandwidth, GB/s"
    )
    right_axes.legend(loc="lower right")

    trace.draw(below.subplots(), step)
    figure.supxlabel(bandwidth.machine, fontsize=7, color="#64748b")
    figure.savefig(path, dpi=150)
