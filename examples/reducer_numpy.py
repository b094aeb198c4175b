"""The demo's model, trained with gradients that are averaged while backward computes the others.

    pycomm run -n 2 examples/reducer_numpy.py --codec int8

Each rank computes gradients on its share of the batch. A GradientReducer sends those of a layer as soon as
they are final, and finish() waits for what is left. Each rank then takes the same optimizer step with the
same averages on the same parameters, so that the replicas stay equal bit for bit. `train` is all of it, and
what `make demo` runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from lm.data import VOCABULARY, Tokens, rank_batch, read_text, split_text
from lm.model import Adam, Model, Shape
from lm.train import GLOBAL_BATCH, SEED, learning_rate, replicas_equal

import pycomm

BUCKET_MB = 1.0  # the model's gradients have 4 MiB: W2 is most of them


def train(
    comm: pycomm.Communicator,
    shape: Shape,
    text: Tokens,
    steps: int,
    codec: str | None = None,
    report: Callable[[float], None] = lambda loss: None,
) -> tuple[Model, list[float]]:
    """Returns the model and the loss of each step, averaged over ranks. After a step each rank calls `report`
    with the loss on its own share of the batch."""
    n = shape.count()
    model = Model(shape, np.empty(n, np.float32), np.empty(n, np.float32), seed=SEED)
    optimizer = Adam(model.params, model.grads)
    comm.broadcast(model.params, root=0)  # the replicas start equal, whatever each rank drew

    gradients = shape.views(model.grads)
    reducer = pycomm.GradientReducer(
        gradients.values(), comm, names=gradients, bucket_mb=BUCKET_MB, codec=codec
    )
    numbers = {name: i for i, name in enumerate(gradients)}

    def final(*names: str) -> None:
        for name in names:
            reducer.ready(numbers[name])

    losses = np.zeros(steps)
    for step in range(steps):
        x, y = rank_batch(
            text, shape.context, GLOBAL_BATCH, seed=SEED, step=step, rank=comm.rank, size=comm.size
        )
        losses[step] = model.backward(x, y, final)  # sends gradients meanwhile
        stats = reducer.finish()
        if stats is not None and stats.finite:
            optimizer.step(learning_rate(step, steps))
        report(losses[step])
    return model, comm.all_reduce(losses, op="avg").tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description="trains the demo's model through a GradientReducer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--codec", help='"int8", for example')
    options = parser.parse_args()

    comm = pycomm.init()
    text, _ = split_text(read_text())
    model, losses = train(comm, Shape(VOCABULARY), text, options.steps, options.codec)
    equal = replicas_equal(comm, model)
    if comm.rank == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; replicas equal: {equal}")
    comm.close()


if __name__ == "__main__":
    main()
