"""Draws docs/architecture.svg: the layers, and the path of comm.all_reduce(x) through them."""

from __future__ import annotations

from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch


class Box(NamedTuple):
    """One or a few files on the path; `x` counts columns of the picture."""

    x: float
    text: str


LAYERS: list[tuple[str, list[Box]]] = [
    ("pycomm/", [Box(2.3, "group.py\nCommunicator"), Box(4.9, "codecs/, bucket.py\nwhat codec= means")]),
    (
        "csrc/bindings/",
        [
            Box(2.3, "collectives.cc, memo.h\nenter; a known call?"),
            Box(3.6, "invocation.cc, lists.cc\ncheck the arguments"),
            Box(4.9, "coding.cc\ncodec= to the request"),
        ],
    ),
    (
        "csrc/runtime/",
        [
            Box(1.0, "executor.h\nruns the plan"),
            Box(2.3, "queue.h, execution.h\nwhose turn; in order"),
            Box(3.6, "binder.cc, plan_cache.cc\nrequest to bound call"),
        ],
    ),
    (
        "csrc/schedule/",
        [
            Box(2.3, "algorithms/\nschedule"),
            Box(3.6, "lower/\nplan: bytes and signals"),
            Box(4.9, "verify/\nproof of the plan"),
        ],
    ),
    (
        "csrc/transport/\ncsrc/kernels/",
        [Box(0.4, "node.h, messages.h\nwindows; messages"), Box(1.6, "combine.h, codec.h\nthe inner loops")],
    ),
    ("csrc/common/", [Box(3.0, "dtype.h, codec.h, error.h, env.h, log.h, ...")]),
]
# Arrows from box to box, which are given by layer and place in it; a label says when.
FIRST, ALWAYS = "tab:blue", "tab:orange"
WAY = [
    ((0, 0), (1, 0), ALWAYS, ""),
    ((1, 0), (2, 1), ALWAYS, "a known call"),
    ((2, 1), (2, 0), ALWAYS, ""),
    ((2, 0), (4, 0), ALWAYS, ""),
    ((2, 0), (4, 1), ALWAYS, ""),
    ((1, 0), (1, 1), FIRST, ""),
    ((1, 1), (2, 2), FIRST, "a new call"),
    ((2, 2), (3, 0), FIRST, "no plan yet"),
    ((3, 0), (3, 1), FIRST, ""),
    ((3, 1), (3, 2), FIRST, ""),
    ((2, 2), (2, 1), FIRST, ""),
    ((1, 1), (1, 2), FIRST, ""),
    ((1, 2), (0, 1), FIRST, "with a codec"),
]
WIDTH, HEIGHT = 1.12, 0.52


def at(place: tuple[int, int]) -> tuple[float, float]:
    layer, box = place
    return LAYERS[layer][1][box].x, -float(layer)


def draw(axes: Axes) -> None:
    for i, (name, boxes) in enumerate(LAYERS):
        axes.axhspan(-i - 0.45, -i + 0.45, color="0.95" if i % 2 else "0.9", zorder=0)
        axes.text(-1.03, -i + 0.36, name, va="top", ha="left", family="monospace", size=9, weight="bold")
        for x, text in boxes:
            wide = WIDTH * (2 if len(boxes) == 1 else 1)
            axes.add_patch(
                FancyBboxPatch(
                    (x - wide / 2, -i - HEIGHT / 2 - 0.06),
                    wide,
                    HEIGHT,
                    boxstyle="round,pad=0,rounding_size=0.06",
                    facecolor="white",
                    edgecolor="0.4",
                    zorder=2,
                )
            )
            axes.text(x, -i - 0.06, text, va="center", ha="center", size=8.5, zorder=4)
    for begin, end, color, label in WAY:
        (x0, y0), (x1, y1) = at(begin), at(end)
        if y0 == y1:
            side = WIDTH / 2 if x1 > x0 else -WIDTH / 2
            x0, x1 = x0 + side, x1 - side
        else:
            down = HEIGHT / 2 if y1 < y0 else -HEIGHT / 2
            y0, y1 = y0 - down, y1 + down
        axes.annotate(
            "",
            (x1, y1 - 0.06),
            (x0, y0 - 0.06),
            arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.4},
            zorder=3,
        )
        if label:
            middle = ((x0 + x1) / 2 + 0.04, (y0 + y1) / 2 - 0.06)
            axes.text(*middle, label, size=8, color=color, style="italic", zorder=5)
    axes.set(xlim=(-1.1, 5.55), ylim=(-len(LAYERS) + 0.5, 0.5))
    axes.axis("off")


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "pycomm"  # the same file each time
    mpl.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(10.5, 7.5), layout="constrained")
    draw(figure.add_subplot())
    figure.savefig("docs/architecture.svg", metadata={"Date": None})
