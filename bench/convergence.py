"""Whether compressed and older averages train a model as exact ones do.

    pycomm run -n 2 bench/convergence.py --json convergence.json

Trains the language model of examples/lm, smaller, once for each way to average and each seed, which draws the
weights and the batches. Prints a table of the losses on text that was held out. A way is *within the spread*
if the mean of its losses lies between the lowest and the highest loss of exact averages. Where torch is
installed, exact averages are compared with Gloo's, loss by loss. Some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import pycomm
from pycomm.codecs import PowerSGD
from pycomm.codecs.kinds import resolve, wire_bytes

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from lm.data import VOCABULARY, Tokens, rank_batch, read_text, split_text
from lm.model import Adam, Model, Shape
from lm.train import learning_rate

SHAPE = Shape(VOCABULARY, embedding=16, hidden=128)
BATCH = 240  # of all ranks together
HELD_OUT = 8192
GLOO = "gloo"


@dataclass(frozen=True)
class Way:
    """One way to average, as GradientReducer takes it."""

    name: str
    codec: str | None = None
    rank: int = 0  # of powersgd
    error_feedback: bool = False
    lag: int = 0

    def reducer(self, model: Model, comm: pycomm.Communicator) -> pycomm.GradientReducer:
        gradients = SHAPE.views(model.grads)
        codec: Any = self.codec
        more: dict[str, Any] = {"error_feedback": self.error_feedback} if codec else {}
        if codec == "powersgd":
            codec, more = PowerSGD(self.rank, error_feedback=self.error_feedback), {}
        return pycomm.GradientReducer(
            gradients.values(), comm, names=gradients, codec=codec, lag=self.lag, **more
        )

    def bytes_sent(self) -> float:
        """Of one encode of all gradients; biases are exempt from error feedback, and from powersgd."""
        total = 0.0
        for shape in SHAPE.parameters().values():
            count = math.prod(shape)
            exempt = len(shape) < 2 and (self.error_feedback or self.codec == "powersgd")
            if self.codec is None or exempt:
                total += 4 * count
            elif self.codec == "powersgd":
                total += min(PowerSGD(self.rank).wire_bytes(shape), 4 * count)
            else:
                total += wire_bytes(resolve(self.codec, "all_reduce"), count)
        return total


EXACT = Way("exact")
WAYS = [
    EXACT,
    Way("int8, error feedback", "int8", error_feedback=True),
    Way("int8", "int8"),
    Way("fp8_e4m3, error feedback", "fp8_e4m3", error_feedback=True),
    Way("fp8_e4m3", "fp8_e4m3"),
    Way("powersgd, rank 4, error feedback", "powersgd", 4, error_feedback=True),
    Way("powersgd, rank 4", "powersgd", 4),
    Way("powersgd, rank 16, error feedback", "powersgd", 16, error_feedback=True),
    Way("exact, lag 1", lag=1),
    Way("exact, lag 2", lag=2),
]


@dataclass
class Result:
    way: str
    seed: int
    losses: list[float]  # of each step, on the batch of all ranks
    held_out: float


class Data:
    def __init__(self) -> None:
        self.text, held_out = split_text(read_text())
        self.x, self.y = rank_batch(held_out, SHAPE.context, HELD_OUT, seed=0, step=0)

    def batch(self, comm: pycomm.Communicator, seed: int, step: int) -> tuple[Tokens, Tokens]:
        return rank_batch(
            self.text, SHAPE.context, BATCH, seed=seed, step=step, rank=comm.rank, size=comm.size
        )


def new_model(seed: int) -> Model:
    count = SHAPE.count()
    return Model(SHAPE, np.empty(count, np.float32), np.empty(count, np.float32), seed=seed)


def train(comm: pycomm.Communicator, data: Data, way: Way, seed: int, steps: int) -> Result:
    """Trains by a GradientReducer."""
    model = new_model(seed)
    optimizer = Adam(model.params, model.grads)
    reducer = way.reducer(model, comm)
    losses = np.zeros(steps)

    def update(stats: pycomm.Stats | None) -> None:
        if stats is not None:  # not so in the first steps, with a lag
            optimizer.step(learning_rate(optimizer.steps, steps))

    for step in range(steps):
        losses[step] = model.backward(*data.batch(comm, seed, step))
        for i in range(len(reducer.gradients)):
            reducer.ready(i)
        update(reducer.finish())
    for stats in reducer.drain():
        update(stats)
    comm.all_reduce(losses, op="avg")
    return Result(way.name, seed, losses.tolist(), model.loss(data.x, data.y))


def train_on_gloo(comm: pycomm.Communicator, data: Data, seed: int, steps: int) -> Result:
    """The same with torch.distributed's own backend."""
    import torch
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        path = str(comm.broadcast_object(f"{folder}/store"))
        dist.init_process_group(
            GLOO, store=dist.FileStore(path, comm.size), rank=comm.rank, world_size=comm.size
        )
        model = new_model(seed)
        optimizer = Adam(model.params, model.grads)
        losses = np.zeros(steps)
        for step in range(steps):
            losses[step] = model.backward(*data.batch(comm, seed, step))
            dist.all_reduce(torch.from_numpy(model.grads))
            model.grads /= comm.size
            optimizer.step(learning_rate(step, steps))
        dist.destroy_process_group()
        comm.barrier()  # before the folder goes
    comm.all_reduce(losses, op="avg")
    return Result(GLOO, seed, losses.tolist(), model.loss(data.x, data.y))


@dataclass
class Row:
    """What all seeds of a way came to: losses on text that was held out."""

    way: str
    share: float  # of the bytes of exact averages
    mean: float
    lowest: float
    highest: float
    from_exact: float  # mean of the differences to exact averages with the same seed
    within_spread: bool


def rows(results: list[Result]) -> list[Row]:
    exact = {result.seed: result.held_out for result in results if result.way == EXACT.name}
    shares = {way.name: way.bytes_sent() / EXACT.bytes_sent() for way in WAYS}
    found = []
    for way in dict.fromkeys(result.way for result in results if result.way != GLOO):
        of_way = {result.seed: result.held_out for result in results if result.way == way}
        losses = list(of_way.values())
        mean = float(np.mean(losses))
        from_exact = float(np.mean([loss - exact[seed] for seed, loss in of_way.items()]))
        within = min(exact.values()) <= mean <= max(exact.values())
        found.append(Row(way, shares[way], mean, min(losses), max(losses), from_exact, within))
    return found


def from_gloo(results: list[Result]) -> float | None:
    """The largest relative difference between losses of one step; None without Gloo."""
    gloo = next((result for result in results if result.way == GLOO), None)
    if gloo is None:
        return None
    exact = next(result for result in results if (result.way, result.seed) == (EXACT.name, gloo.seed))
    ours, theirs = np.array(exact.losses), np.array(gloo.losses)
    return float(np.max(np.abs(ours - theirs) / theirs))


def table(found: list[Row]) -> Table:
    shown = Table("way", "bytes", "mean loss", "lowest", "highest", "from exact", "within the spread")
    for row in found:
        losses = (f"{loss:.4f}" for loss in (row.mean, row.lowest, row.highest))
        shown.add_row(
            row.way,
            f"{row.share:.0%}",
            *losses,
            f"{row.from_exact:+.4f}",
            "yes" if row.within_spread else "no",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the table and the last losses of each run")
    options = parser.parse_args()
    if options.steps < 1 or options.seeds < 1:
        parser.error("--steps and --seeds must be at least 1")

    comm = pycomm.init()
    console, data = Console(quiet=comm.rank != 0), Data()
    results = []
    for way in WAYS:
        for seed in range(options.seeds):
            results.append(train(comm, data, way, seed, options.steps))
            console.print(f"{way.name}, seed {seed}: held-out loss {results[-1].held_out:.4f}")
    if find_spec("torch") is not None:
        results.append(train_on_gloo(comm, data, 0, options.steps))
    found, difference = rows(results), from_gloo(results)
    console.print(table(found))
    if difference is None:
        console.print("torch is not installed: not compared with Gloo")
    else:
        console.print(
            f"exact averages and Gloo's: losses differ by at most {difference:.1e} of them in a step"
        )
    if options.json and comm.rank == 0:
        about = {"ranks": comm.size, "steps": options.steps, "parameters": SHAPE.count(), "batch": BATCH}
        record = about | {
            "from_gloo": difference,
            "rows": [asdict(row) for row in found],
            "losses": [[result.way, result.seed, result.losses[-1], result.held_out] for result in results],
        }
        options.json.write_text(json.dumps(record))
    comm.close()


if __name__ == "__main__":
    main()
