"""`pycomm bench codecs`: its figures follow the definitions, and mistakes are named."""

import json
from pathlib import Path
from typing import Any

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
    routes = 2 * len(bench.KINDS) - 3  # shared_int, twice, and topk have only their own
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
    """Constants between two float16 numbers are always rounded down to the lower one."""
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
        (["--algorithms", "star"], "--algorithms star: this command compares two_shot and ring"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--gradients", "no/such.npz"], "record_gradients.py"),
        (["--json", "no/such/place.json"], "there is no directory"),
        (["--json", "."], "--json .: is a directory"),
        (["--plot", "chart.txt"], "--plot chart.txt: the name of a chart must end in .png"),
        (["--ranks", "99999"], "--ranks 99999: at most 64"),
        (["--count", "10000000000000"], "--count 10000000000000"),
    ],
)
def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], args: list[str], words: str) -> None:
    assert main.main(["bench", "codecs", *args]) == 2
    out, err = capsys.readouterr()
    assert words in err and len(err.splitlines()) == 1 and out == ""


def npz(path: Path, gradients: Any, shapes: Any) -> str:
    np.savez(path, gradients=gradients, shapes=shapes)
    return str(path)


@pytest.mark.parametrize(
    ("gradients", "shapes"),
    [
        (np.zeros((3, 2, 10), np.float32), [["w", "[9]"]]),
        (np.zeros((3, 2, 10), np.float32), [["w", "[-1, -10]"]]),
        (np.zeros((3, 2, 10), np.float32), [["w", '["x"]']]),
        (np.zeros((3, 2, 10), np.float32), [["w", "10"]]),
        (np.zeros((3, 2, 10), np.float32), ["w", "v"]),
        (np.zeros((3, 2, 10), np.int64), [["w", "[10]"]]),
        (np.zeros((3, 10), np.float32), [["w", "[10]"]]),
        (np.full((3, 2, 10), np.nan, np.float32), [["w", "[10]"]]),
    ],
)
def test_files_that_hold_no_gradients_are_refused(tmp_path: Path, gradients: Any, shapes: Any) -> None:
    with pytest.raises(ValueError, match=r"holds no gradients .*record_gradients.py"):
        bench.recorded(npz(tmp_path / "g.npz", gradients, shapes), 3)


def test_an_array_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "g.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="holds no gradients"):
        bench.recorded(str(tmp_path / "g.npz"), 3)


def test_gradients_of_fewer_steps_or_ranks_are_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = npz(tmp_path / "g.npz", np.ones((3, 2, 10), np.float32), [["w", "[2, 5]"]])
    for option, value in (("steps", "4"), ("ranks", "3")):
        args = {"steps": "3", "ranks": "2"} | {option: value}
        words = [word for name in args for word in (f"--{name}", args[name])]
        assert main.main(["bench", "codecs", "--gradients", path, *words]) == 2
        assert f"--{option} {value}: {path} has {int(value) - 1}" in capsys.readouterr().err


def test_shared_integers_are_left_out_where_they_have_no_levels() -> None:
    data = bench.gaussian(64, 1, 25)
    names = [row.codec for row in bench.measure(data, [25], ["two_shot"])]
    assert "shared_int 16" in names and "shared_int 8" not in names
