"""Records a model's gradients, for `pycomm bench codecs --gradients`.

    python examples/record_gradients.py gradients.npz

Trains the language model of lm/ in one process, as `--ranks` ranks would, each on its own rows of the batch,
and writes the gradient of each step and rank: 300 steps of 8 ranks are 300 MB.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from lm.data import VOCABULARY, rank_batch, read_text, split_text
from lm.model import Adam, Model, Shape
from lm.train import GLOBAL_BATCH, SEED, learning_rate
from numpy.typing import NDArray


def record(shape: Shape, steps: int, ranks: int) -> NDArray[np.float32]:
    """Returns the gradients as (steps, ranks, parameters)."""
    text, _ = split_text(read_text())
    count = shape.count()
    mean = np.zeros(count, np.float32)
    model = Model(shape, np.empty(count, np.float32), np.empty(count, np.float32), seed=SEED)
    optimizer = Adam(model.params, mean)
    recorded = np.empty((steps, ranks, count), np.float32)
    for step in range(steps):
        for rank in range(ranks):
            x, y = rank_batch(text, shape.context, GLOBAL_BATCH, seed=SEED, step=step, rank=rank, size=ranks)
            loss = model.backward(x, y)
            recorded[step, rank] = model.grads
        mean[:] = recorded[step].mean(axis=0)
        optimizer.step(learning_rate(step, steps))
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss:.3f}")
    return recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a new .npz file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=8, help=f"a divisor of {GLOBAL_BATCH}")
    parser.add_argument("--hidden", type=int, default=64)
    options = parser.parse_args()
    if options.path.suffix != ".npz" or not options.path.parent.is_dir():
        parser.error(f"{options.path}: give the path of an .npz file, in a folder that exists")
    if options.steps < 1 or options.hidden < 1:
        parser.error("--steps and --hidden must be at least 1")
    if options.ranks < 1 or GLOBAL_BATCH % options.ranks:
        parser.error(f"--ranks {options.ranks}: it must divide the batch of {GLOBAL_BATCH}")
    shape = Shape(VOCABULARY, embedding=16, hidden=options.hidden)
    shapes = [[name, json.dumps(of)] for name, of in shape.parameters().items()]
    np.savez(options.path, gradients=record(shape, options.steps, options.ranks), shapes=shapes)
    print(f"{options.path}: {options.steps} steps, {options.ranks} ranks, {shape.count()} parameters")


if __name__ == "__main__":
    main()
