"""`pycomm bench codecs`: what it prints is what the definitions give, and mistakes are named."""

import json
from pathlib import Path

import numpy as np
import pytest

from pycomm import codecs
from pycomm.bench import codecs as bench
from pycomm.cli import main


def test_rows_and_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "gradients.npz"
    values = np.random.default_rng(0).standard_normal((3, 2, 1000), np.float32)
    np.savez(path, gradients=values, shapes=[["w", "[30, 30]"], ["b", "[100]"]])
    files = [tmp_path / "out.json", tmp_path / "out.png"]
    options = ["--ranks", "2", "--steps", "3", "--count", "512", "--gradients", str(path)]
    assert main.main(["bench", "codecs", *options, f"--json={files[0]}", f"--plot={files[1]}"]) == 0
    assert "with feedback" in capsys.readouterr().out
    rows = json.loads(files[0].read_text())["rows"]
    routes = 2 * len(bench.KINDS) - 3  # shared_int, twice, and topk have one of their own
    assert len(rows) == 2 * routes
    for row in rows:
        errors = [*row["vnmse"].values(), *(drift["drift"] for drift in row["without"].values())]
        assert all(0 < error < 1.5 for error in errors), row
        fed = row["with_feedback"]
        assert (fed is None) == row["codec"].startswith("shared_int")
        if fed:
            assert abs(fed["bias"]) <= fed["drift"] < 1.5 * max(errors)
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_drift_and_bias_are_what_they_are_said_to_be() -> None:
    """Constants that lie between two numbers of float16 lose what is above the lower one, every time."""
    values = np.full((4, 2, 256), 1 + 2.0**-12, np.float32)
    error, drift = bench._run(
        bench.Gradients("x", {"x": (256,)}, values), 2, None, lambda: codecs.FP16(rounding="nearest")
    )
    lost = 1 - 1 / (1 + 2.0**-12)
    assert error == pytest.approx(lost**2, rel=1e-6)
    assert drift.bias == pytest.approx(-lost, rel=1e-6)
    assert drift.drift == pytest.approx(lost, rel=1e-6)


@pytest.mark.parametrize(
    ("codec", "size"),
    [
        (codecs.FP16(), 2 * 2048),
        (codecs.FP8E4M3(), 2048 + 4 * 8),
        (codecs.MXFP8(), 2048 + 64),
        (codecs.Int8(), 2048 + 2 * 16),
        (codecs.Int4(), 1024 + 2 * 64),
        (codecs.Sign(), 256 + 4 * 16),
        (codecs.TopK(ratio=0.01), 16 + 8 * 20),
        (codecs.SharedInt(), 2048 + 4 * 16),
        (codecs.SharedInt(width=16), 4096 + 4 * 16),
    ],
)
def test_bytes(codec: codecs.Codec, size: int) -> None:
    assert bench.wire_bytes(codec, 2048) == size


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ranks", "2,x"], "--ranks 2,x"),
        (["--ranks", "0"], "--ranks 0"),
        (["--algorithms", "star"], "--algorithms star: what is compared here is two_shot and ring"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--gradients", "no/such.npz"], "record_gradients.py"),
        (["--json", "no/such/place.json"], "there is no directory"),
    ],
)
def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], args: list[str], words: str) -> None:
    assert main.main(["bench", "codecs", *args]) == 2
    out, err = capsys.readouterr()
    assert words in err and len(err.splitlines()) == 1 and out == ""
