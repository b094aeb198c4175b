"""The chart of a run: time over size, and the peers' time over pycomm's."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from pycomm.bench.measure import Row


def plot(rows: Sequence[Row], path: str, machine: str) -> None:
    names = list(dict.fromkeys(row.collective for row in rows if row.collective != "barrier"))
    if not names:
        raise ValueError("--plot: there is nothing to draw: a barrier has no size")
    figure, axes = plt.subplots(len(names), 2, figsize=(12, 4.2 * len(names)), squeeze=False)
    for (left, right), name in zip(axes, names, strict=True):
        found = [row for row in rows if row.collective == name]
        lines: dict[str, list[tuple[int, float]]] = {}
        ratios: dict[str, list[tuple[int, float]]] = {}
        for row in found:
            ours = f"pycomm, {row.buffers}" + (", persistent" if row.persistent else "")
            if len({r.algorithm for r in found if r.bytes == row.bytes}) > 1:
                ours += f", {row.algorithm}"
            lines.setdefault(ours, []).append((row.bytes, row.pycomm_us))
            for peer, us in row.peers.items():
                if (row.bytes, us) not in lines.setdefault(peer, []):
                    lines[peer].append((row.bytes, us))
                ratios.setdefault(f"{peer} / {ours}", []).append((row.bytes, row.ratios[peer]))
        for axis, curves in ((left, lines), (right, ratios)):
            for label, points in curves.items():
                style = "-o" if label.startswith("pycomm") or axis is right else "--s"
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=3)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel("bytes")
            axis.grid(alpha=0.3)
            if curves:
                axis.legend(fontsize=7)
        left.set_ylabel("us a call, median")
        left.set_title(f"{name}, {found[0].ranks} ranks")
        right.set_ylabel("peer's time / pycomm's")
        right.axhline(1, color="black", linewidth=0.8)
        right.set_title("above 1: pycomm is faster")
    figure.suptitle(machine, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
