"""examples/ddp_transformer.py, as people start it: by each launcher, alone, resumed, on Gloo."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "ddp_transformer.py"
LAUNCHERS = {
    "pycomm run": ["-m", "pycomm", "run", "-n", "2"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "alone": [],
}
STEPS = 4


def losses(launcher: str, *options: str, steps: int = STEPS) -> dict[int, float]:
    """Those that rank 0 prints, by step."""
    command = [sys.executable, *LAUNCHERS[launcher], str(SCRIPT), "--steps", str(steps), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("ms longer" in done.stdout) == (launcher != "alone")
    found = re.findall(r"step +(\d+): loss ([\d.]+), +\d+ tokens/s", done.stdout)
    return {int(step): float(loss) for step, loss in found}


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], Path]:
    """A run that nothing interrupts."""
    path = tmp_path_factory.mktemp("whole") / "last.pt"
    return losses("pycomm run", "--checkpoint", str(path)), path


@pytest.mark.slow  # each start imports torch
def test_resumed_under_the_other_launcher_it_learns_the_same(
    whole: tuple[dict[int, float], Path], tmp_path: Path
) -> None:
    path = tmp_path / "last.pt"
    assert list(losses("pycomm run", "--checkpoint", str(path), steps=2)) == [2]
    assert checkpoint(path)["step"] == 2
    expected, end = whole
    assert losses("torchrun", "--checkpoint", str(path)) == expected
    resumed, uninterrupted = checkpoint(path), checkpoint(end)
    assert resumed["step"] == uninterrupted["step"] == STEPS
    for name, weight in uninterrupted["model"].items():
        assert torch.equal(resumed["model"][name], weight), name
    for mine, other in zip(resumed["ranks"], uninterrupted["ranks"], strict=True):
        assert torch.equal(mine["random"], other["random"])
    assert not torch.equal(resumed["ranks"][0]["random"], resumed["ranks"][1]["random"])
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_it_learns_on_gloo_what_it_learns_on_pycomm(whole: tuple[dict[int, float], Path]) -> None:
    found = losses("pycomm run", "--backend", "gloo")
    assert found == {STEPS: pytest.approx(whole[0][STEPS], abs=2e-4)}  # float32, printed with four digits


def test_alone_it_goes_on_from_the_checkpoint_of_two(
    whole: tuple[dict[int, float], Path], tmp_path: Path
) -> None:
    expected, end = whole
    path = tmp_path / "last.pt"
    path.write_bytes(end.read_bytes())
    found = losses("alone", "--checkpoint", str(path), steps=STEPS + 2)
    assert list(found) == [STEPS + 2]
    assert found[STEPS + 2] < expected[STEPS]
    assert checkpoint(path)["step"] == STEPS + 2


@pytest.mark.slow
def test_with_a_codec_it_is_resumed_with_what_the_codec_owes(
    whole: tuple[dict[int, float], Path], tmp_path: Path
) -> None:
    def ends(path: Path, *stops: int) -> dict[int, float]:
        for steps in stops:
            found = losses("pycomm run", "--codec", "powersgd", "--checkpoint", str(path), steps=steps)
        return found

    expected, resumed = ends(tmp_path / "whole.pt", STEPS), ends(tmp_path / "resumed.pt", 2, STEPS)
    assert resumed == expected != whole[0]
    weights = [checkpoint(tmp_path / name)["model"] for name in ("whole.pt", "resumed.pt")]
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name
