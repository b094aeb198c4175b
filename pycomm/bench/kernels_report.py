"""The results of `pycomm bench kernels`: a table, JSON, and a chart."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pycomm.bench.kernels import Row


def table(rows: Sequence[Row]) -> Table:
    shown = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("workload", "kernel", "moved(MB)", "time(us) min (median)", "GB/s", "of the copy"):
        shown.add_column(name, justify="left" if name in ("workload", "kernel") else "right")
    with_ratio = any(row.ratio is not None for row in rows)
    if with_ratio:
        shown.add_column("encoded", justify="right")
    shown.add_column("fastest other way: time(us), over ours", justify="left")
    for row in rows:
        other = ""
        if row.fastest_rival:
            other = f"{row.fastest_rival} {row.rivals[row.fastest_rival].min_us:.0f}, {row.speedup:.2f}x"
        ratio = [f"{row.ratio:.3f}" if row.ratio is not None else ""] if with_ratio else []
        shown.add_row(
            row.workload,
            row.kernel,
            f"{row.bytes / 1e6:.1f}",
            f"{row.times.min_us:.1f} ({row.times.median_us:.1f})",
            f"{row.gbps:.1f}",
            f"{row.share:.0%}",
            *ratio,
            other,
        )
    return shown


def as_json(rows: Sequence[Row], machine: str) -> str:
    return json.dumps({"machine": machine, "rows": [row.as_dict() for row in rows]}, indent=1)


def plot(rows: Sequence[Row], path: str, machine: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(row.kernel for row in rows))
    workloads = list(dict.fromkeys(row.workload for row in rows))
    thick = 0.8 / len(workloads)
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.32 * len(labels)))
    for n, workload in enumerate(workloads):
        found = [row for row in rows if row.workload == workload]
        heights = [labels.index(row.kernel) + n * thick for row in found]
        axis.barh(heights, [row.share for row in found], thick * 0.9, color=f"C{n}", label=workload)
        rivals = [
            (height, row.share / row.speedup)
            for height, row in zip(heights, found, strict=True)
            if row.speedup
        ]
        axis.plot(
            [share for _, share in rivals],
            [height for height, _ in rivals],
            "k|",
            markersize=8,
            label="fastest other way" if n == 0 else None,
        )
    axis.set_yticks([n + 0.4 - thick / 2 for n in range(len(labels))], labels, fontsize=8)
    axis.set_ylim(len(labels) + 2, -0.6)  # from the top down, with room for the legend
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("share of the copy's bandwidth")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    axis.set_title(machine, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
