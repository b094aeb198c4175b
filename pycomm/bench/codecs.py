"""How codecs change a result: the error of one call, the drift of many, and the bytes sent.

vNMSE is |x' - x|^2 / |x|^2 of the averaged vector, as the mean over the steps. With S' and S the sums over
the steps, drift is |S' - S| / |S|, and bias is its signed part along S: (S' - S) . S / |S|^2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.table import Table

import pycomm
from pycomm import codecs
from pycomm.codecs.kinds import wire_bytes

Vector = npt.NDArray[np.float32]
Kind = Callable[..., codecs.Codec]


@dataclass(frozen=True)
class Gradients:
    """`values` is (steps, ranks, elements); `shapes` are those of the parameters, in the elements' order."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    values: Vector

    @property
    def steps(self) -> int:
        return len(self.values)

    @property
    def ranks(self) -> int:
        return int(self.values.shape[1])

    def mean(self, step: int, ranks: int) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = np.mean(self.values[step, :ranks], axis=0, dtype=np.float64)
        return found


@dataclass(frozen=True)
class Drift:
    bias: float
    drift: float


@dataclass(frozen=True)
class Row:
    data: str
    codec: str
    ranks: int
    algorithm: str
    bytes_per_element: float  # of one encode, including block scales
    vnmse: dict[str, float]  # rounding -> error of one call
    without: dict[str, Drift]  # rounding -> drift over all steps
    with_feedback: Drift | None


def gaussian(count: int, steps: int, ranks: int) -> Gradients:
    """A constant mean, and noise of the same size that differs by rank and step; both are normal."""
    rng = np.random.default_rng(0)
    kept = rng.standard_normal(count, np.float32)
    values = rng.standard_normal((steps, ranks, count), np.float32)
    values += kept
    return Gradients("Gaussian", {"x": (count,)}, values)


def recorded(path: str, steps: int) -> Gradients:
    """Reads a file of examples/record_gradients.py. ValueError if it contains something else."""
    try:
        with np.load(path) as file:
            values = file["gradients"][:steps]
            shapes = {
                str(name): tuple(map(int, json.loads(shape))) for name, shape in file["shapes"].tolist()
            }
        if values.dtype != np.float32 or values.ndim != 3 or not np.isfinite(values).all():
            raise ValueError("they are not finite float32 of (steps, ranks, elements)")
        if any(size < 1 for shape in shapes.values() for size in shape):
            raise ValueError("a shape has sizes that are not positive")
        if sum(math.prod(shape) for shape in shapes.values()) != values.shape[2]:
            raise ValueError("the number of elements does not match the shapes")
    except (OSError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no gradients ({error}): examples/record_gradients.py records some"
        ) from None
    return Gradients("recorded", shapes, values)


KINDS: dict[str, Kind] = {
    "fp16": codecs.FP16,
    "bf16": codecs.BF16,
    "fp8_e4m3": codecs.FP8E4M3,
    "fp8_e5m2": codecs.FP8E5M2,
    "mxfp8": codecs.MXFP8,
    "mxfp8 ceil": lambda **options: codecs.MXFP8(scale="ceil", **options),
    "int8": codecs.Int8,
    "int4": codecs.Int4,
    "int4 hadamard": lambda **options: codecs.Int4(hadamard=True, **options),
    "shared_int 8": codecs.SharedInt,
    "shared_int 16": lambda **options: codecs.SharedInt(width=16, **options),
    "sign": codecs.Sign,
    "topk 1%": codecs.TopK,
}


def measure(data: Gradients, ranks: Sequence[int], algorithms: Sequence[str]) -> Iterator[Row]:
    for size, algorithm, name in cases(ranks, algorithms):
        row = _row(name, KINDS[name], data, size, algorithm)
        yield row if algorithm else replace(row, algorithm="its own")


def cases(ranks: Sequence[int], algorithms: Sequence[str]) -> Iterator[tuple[int, str | None, str]]:
    """Ranks, algorithm and name of each row; the algorithm is None if the codec brings its own all_reduce."""
    for size in ranks:
        for algorithm in algorithms:
            for name in KINDS:
                of_all_reduce = name.startswith(("topk", "shared_int"))
                if of_all_reduce and algorithm != algorithms[0]:
                    continue
                if name.startswith("shared_int") and not _has_levels(int(name.split()[1]), size):
                    continue
                yield size, None if of_all_reduce else algorithm, name


def _has_levels(width: int, ranks: int) -> bool:
    """Whether shared integers of `width` bits have enough levels for `ranks` ranks."""
    return ((1 << (width - 1)) - 1) // ranks >= 7


def _row(name: str, kind: Kind, data: Gradients, size: int, algorithm: str | None) -> Row:
    if name.startswith("shared_int"):
        plain: dict[str, codecs.Codec] = {"stochastic": kind()}
        fed = False
    elif name.startswith(("sign", "topk")):
        plain, fed = {"nearest": kind(error_feedback=False)}, True
    else:
        plain, fed = {rounding: kind(rounding=rounding) for rounding in ("nearest", "stochastic")}, True
    vnmse, without = {}, {}
    for rounding, codec in plain.items():
        vnmse[rounding], without[rounding] = _run(data, size, algorithm, partial(_same, codec))
    with_feedback = _run(data, size, algorithm, partial(_fed, kind))[1] if fed else None
    count = sum(int(np.prod(shape)) for shape in data.shapes.values())
    return Row(
        data.name,
        name,
        size,
        algorithm or "",
        wire_bytes(next(iter(plain.values())), count) / count,
        vnmse,
        without,
        with_feedback,
    )


def _same(codec: codecs.Codec) -> codecs.Codec:
    return codec


def _fed(kind: Kind) -> codecs.Codec:
    return kind(error_feedback=codecs.ErrorFeedback(exempt=lambda name, shape: False))


def _run(
    data: Gradients, size: int, algorithm: str | None, make: Callable[[], codecs.Codec]
) -> tuple[float, Drift]:
    def fn(comm: pycomm.Communicator) -> tuple[float, Drift] | None:
        codec = make()  # one for each rank, which has its own residuals
        parts = _split(data.values[0, comm.rank], data.shapes)
        bucket = pycomm.Bucket(parts, names=data.shapes)
        errors, got_sum, exact_sum = [], np.zeros(1), np.zeros(1)
        for step in range(data.steps):
            bucket.tensors = _split(data.values[step, comm.rank], data.shapes)
            bucket.pack()
            comm.all_reduce(bucket, op="avg", codec=codec, algorithm=algorithm, step=step)
            if comm.rank == 0:
                exact = data.mean(step, size)
                got = np.concatenate([np.asarray(view).ravel() for view in bucket.views])
                errors.append(np.sum((got - exact) ** 2) / max(np.sum(exact**2), 1e-300))
                got_sum, exact_sum = got_sum + got, exact_sum + exact
        if comm.rank:
            return None
        off, square = got_sum - exact_sum, np.sum(exact_sum**2)
        return float(np.mean(errors)), Drift(
            float(off @ exact_sum / square), float(np.sqrt(np.sum(off**2) / square))
        )

    found = pycomm.run_local(fn, size)[0]
    assert found is not None
    return found


def _split(flat: Vector, shapes: dict[str, tuple[int, ...]]) -> list[Vector]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    return [
        part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), shapes.values(), strict=True)
    ]


# ---- for people and for programs ----


def table(rows: Sequence[Row], steps: int) -> Table:
    shown = Table(
        title=f"bias and drift of the sum of {steps} steps, in percent",
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("data", "codec", "ranks", "algorithm"):
        shown.add_column(name)
    columns = ("B/element", "nearest\nvNMSE", "\nbias", "\ndrift", "stochastic\nvNMSE", "\nbias", "\ndrift")
    for name in (*columns, "with feedback\nbias", "\ndrift"):
        shown.add_column(name, justify="right")
    for row in rows:
        cells = [row.data, row.codec, str(row.ranks), row.algorithm, f"{row.bytes_per_element:.4g}"]
        for rounding in ("nearest", "stochastic"):
            error = row.vnmse.get(rounding)
            cells.append("-" if error is None else f"{error:.2g}")
            cells += _cells(row.without.get(rounding))
        shown.add_row(*cells, *_cells(row.with_feedback))
    return shown


def _cells(drift: Drift | None) -> list[str]:
    return ["-", "-"] if drift is None else [f"{100 * drift.bias:+.2g}", f"{100 * drift.drift:.2g}"]


def as_json(rows: Sequence[Row], machine: str, steps: int) -> str:
    return json.dumps({"machine": machine, "steps": steps, "rows": [asdict(row) for row in rows]}, indent=1)


def plot(rows: Sequence[Row], path: str, machine: str) -> None:
    """Draws the vNMSE of one call and the drift over all, without and with feedback, by codec."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row.codec for row in rows))
    colours = {data: f"C{n}" for n, data in enumerate(dict.fromkeys(row.data for row in rows))}
    routes = list(dict.fromkeys((row.ranks, row.algorithm) for row in rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for row in rows:
        colour = colours[row.data]
        place = names.index(row.codec) + 0.8 * (routes.index((row.ranks, row.algorithm)) / len(routes) - 0.5)
        left.scatter(place, min(row.vnmse.values()), color=colour, s=14)
        right.scatter(place, 100 * min(d.drift for d in row.without.values()), color=colour, marker="_")
        if row.with_feedback is not None:
            right.scatter(place, 100 * row.with_feedback.drift, color=colour, s=14)
    for axis in (left, right):
        axis.set_yscale("log")
        axis.set_xticks(range(len(names)), names, rotation=60)
        axis.grid(alpha=0.3)
    for data, colour in colours.items():
        left.scatter([], [], color=colour, label=data)
    left.legend()
    left.set_title("vNMSE of one call, the better rounding", fontsize=10)
    right.axhline(0.4, color="black", linewidth=0.8)
    right.set_title("drift in %: dashes without error feedback, dots with; the line is 0.4 %", fontsize=10)
    order = ", ".join(f"{ranks} ranks {algorithm}" for ranks, algorithm in routes)
    figure.suptitle(f"{machine}\nfrom left to right within a codec: {order}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
