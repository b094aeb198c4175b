"""The program of every rank of the demo: trains, and traces it. Rank 0 reports one JSON object per line.

cd examples && python -m pycomm run -n 2 -m lm.rank
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from time import perf_counter
from typing import Any

from reducer_numpy import train

import pycomm

from .data import VOCABULARY, rank_batch, read_text, split_text
from .model import Shape
from .train import SEED, STEPS, replicas_equal


def typical_step(trace: pycomm.trace.Trace) -> list[dict[str, Any]]:
    """One step as each rank saw it: that of median length on rank 0."""
    times = [step.end - step.begin for step in trace.ranks[0]]
    chosen = times.index(statistics.median_low(times))
    return [steps[chosen].as_dict() for steps in trace.ranks]


def main() -> None:
    parser = argparse.ArgumentParser(prog="lm.rank", description="train on all ranks of this world")
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps

    comm = pycomm.init()
    text, held_out = split_text(read_text())
    shape = Shape(VOCABULARY)

    def report(**event: Any) -> None:
        if comm.rank == 0:
            print(json.dumps(event), flush=True)

    def after_step(loss: float) -> None:
        nonlocal begin
        begin, before = perf_counter(), begin
        report(event="step", loss=loss, seconds=begin - before)

    report(event="start", parameters=shape.count(), text_bytes=len(text))
    with pycomm.trace.start(comm) as trace:  # keeps the latest 100 steps
        begin = perf_counter()
        model, losses = train(comm, shape, text, steps, report=after_step)
    equal = replicas_equal(comm, model)
    if comm.rank == 0:
        x, y = rank_batch(held_out, shape.context, 8192, seed=SEED, step=0)
        sample = model.sample(b"\n    def __init__(self, ", length=400, temperature=0.8, seed=SEED)
        report(
            event="end",
            losses=losses,
            held_out=model.loss(x, y),
            replicas_equal=equal,
            sample=sample.decode("ascii").strip("\n"),
            communication=asdict(trace.summary(0)),
            typical_step=typical_step(trace),
        )
    comm.close()


if __name__ == "__main__":
    main()
