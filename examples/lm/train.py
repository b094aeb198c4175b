"""Data-parallel training with pycomm: the program of every rank.

    cd examples && python -m pycomm run -n 2 -m lm.train

Each rank computes the gradient on its share of the batch; one all_reduce averages the gradients; each rank
then takes the same optimizer step on the same parameters, so that the replicas stay equal bit for bit.
`train` is all of it. Rank 0 reports one JSON object per line.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

import pycomm

from .data import VOCABULARY, Tokens, rank_batch, read_text, split_text
from .model import Adam, Model, Shape

SEED = 1
STEPS = 400
GLOBAL_BATCH = 960  # divisible by 1 to 6, and by 8
LEARNING_RATE = 4e-3

Report = Callable[[dict[str, Any]], None]


def train(
    comm: pycomm.Communicator, shape: Shape, text: Tokens, steps: int, report: Report, dtype: str = "float32"
) -> Model:
    """Trains a model on all ranks of `comm` together; rank 0 calls `report` for every step."""
    # The gradients live in a shared array: backward writes them where the other ranks can read them, and
    # all_reduce copies nothing. There is one element more than there are parameters, for the loss.
    n = shape.count()
    with pycomm.shared_arrays():
        bucket = np.empty(n + 1, dtype)
    model = Model(shape, np.empty(n, dtype), bucket[:n], seed=SEED)
    optimizer = Adam(model.params, model.grads)
    comm.broadcast(model.params, root=0)  # the replicas start equal, whatever each rank drew
    comm.barrier()  # and start together, so that the first step's wait is typical

    for step in range(steps):
        begin = perf_counter()
        x, y = rank_batch(
            text, shape.context, GLOBAL_BATCH, seed=SEED, step=step, rank=comm.rank, size=comm.size
        )
        bucket[n] = model.backward(x, y)
        computed = perf_counter()
        comm.all_reduce(bucket, op="avg")
        reduced = perf_counter()
        optimizer.step(learning_rate(step, steps))
        if comm.rank == 0:
            report(
                {
                    "event": "step",
                    "loss": float(bucket[n]),
                    "seconds": perf_counter() - begin,
                    "communicating": reduced - computed,  # including the wait for a slower rank
                }
            )
    return model


def learning_rate(step: int, steps: int) -> float:
    """Twenty steps of warm-up, then half a cosine down to zero."""
    return LEARNING_RATE * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def replicas_equal(comm: pycomm.Communicator, model: Model) -> bool:
    """Whether every rank holds the same parameters, bit for bit."""
    mine = np.array([zlib.crc32(model.params)], np.uint32)
    return len(set(comm.all_gather(mine))) == 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="lm.train", description="train on all ranks of this world")
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps

    comm = pycomm.init()
    text, held_out = split_text(read_text())
    shape = Shape(VOCABULARY)

    def report(event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)

    if comm.rank == 0:
        report({"event": "start", "parameters": shape.count(), "text_bytes": len(text)})
    model = train(comm, shape, text, steps, report)
    equal = replicas_equal(comm, model)
    if comm.rank == 0:
        x, y = rank_batch(held_out, shape.context, 8192, seed=SEED, step=0)
        sample = model.sample(b"\n    def __init__(self, ", length=400, temperature=0.8, seed=SEED)
        report(
            {
                "event": "end",
                "held_out": model.loss(x, y),
                "replicas_equal": equal,
                "sample": sample.decode("ascii").strip("\n"),
            }
        )
    comm.close()


if __name__ == "__main__":
    main()
