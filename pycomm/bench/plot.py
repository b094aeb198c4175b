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
        # A colour for each way to call pycomm, a kind of line for each peer.
        colours = {
            label: f"C{n}" for n, label in enumerate(label for label in lines if label.startswith("pycomm"))
        }
        strokes = dict(
            zip(dict.fromkeys(p for row in found for p in row.peers), ("--", ":", "-.", "-"), strict=False)
        )
        for label, points in lines.items():
            look = (
                {"color": colours[label]}
                if label in colours
                else {"color": "black", "linestyle": strokes[label]}
            )
            left.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, **look)
        for label, points in ratios.items():
            peer, _, ours = label.partition(" / ")
            right.plot(*zip(*points, strict=True), linestyle=strokes[peer], color=colours[ours], label=label)
        for axis, curves in ((left, lines), (right, ratios)):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel("bytes")
            axis.grid(alpha=0.3)
            if curves:
                axis.legend(fontsize=6, ncol=1 if axis is left else 2)
        left.set_ylabel("us a call, median")
        left.set_title(f"{name}, {found[0].ranks} ranks")
        right.set_ylabel("peer's time / pycomm's")
        right.axhline(1, color="black", linewidth=0.8)
        right.set_title("above 1: pycomm is faster")
    figure.suptitle(machine, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
