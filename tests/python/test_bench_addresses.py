"""The sweep of addresses: its figures, its orders, and the command that prints it."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pycomm.bench import addresses
from pycomm.bench.addresses import Address, Sweep
from pycomm.bench.measure import Engines, Form
from pycomm.bench.rows import Options
from pycomm.cli import main


def test_pairs_are_equal_and_unequal() -> None:
    found = addresses.pairs([0, 4, 16])
    assert found == [(0, 0), (4, 4), (16, 16), (0, 4), (4, 0), (0, 16), (16, 0)]
    assert addresses.fitting("float32") == [0, 4, 16, 32, 48, 60]
    assert addresses.fitting("uint8") == [0, 4, 16, 32, 48, 60, 63]
    assert addresses.fitting("complex128") == [0, 16, 32, 48]


def test_an_address_counts_with_its_best_quartile() -> None:
    samples = [float(n) for n in range(1, 25)]
    random.Random(1).shuffle(samples)
    address = Address((0, 0), samples)
    assert address.us == 6.0  # a quarter of the 24 are not larger
    even, odd = sorted(samples[0::2]), sorted(samples[1::2])
    assert address.halves_us == (even[2], odd[2])  # the third of twelve
    assert address.spread == max(address.halves_us) / min(address.halves_us)


def sweep(engine: str = "pycomm", size: int = 4096) -> Sweep:
    fast = Address((0, 0), [2.0] * 8)
    slow = Address((0, 16), [5.0] * 8)
    unsteady = Address((16, 0), [2.0, 3.0] * 4)  # the same address, alternately 2 and 3
    return Sweep("all_reduce", size, "float32", 2, engine, "out_of_place", [fast, slow, unsteady])


def test_worst_over_best_beside_one_address_twice() -> None:
    found = sweep()
    assert (found.worst.offsets, found.worst_over_best, found.spread) == ((0, 16), 2.5, 1.5)
    kept = found.as_dict()
    assert (kept["worst_over_best"], kept["spread_of_one_address"]) == (2.5, 1.5)
    assert kept["addresses"][2]["halves_us"] == (2.0, 3.0)
    assert "0, 16" in addresses.line(found) and "2.50" in addresses.line(found)


def test_markdown() -> None:
    text = addresses.markdown([sweep(), sweep(size=1 << 20), sweep("pycomm-other")])
    lines = text.splitlines()
    assert "| collective | form | 4 KiB | 1 MiB |" in lines
    assert "| all_reduce | out of place | 2.50 (1.50) | 2.50 (1.50) |" in lines
    assert "| all_reduce | out of place | 2.50 (1.50) | - |" in lines
    assert sum(line.startswith("pycomm") for line in lines) == 2


@pytest.mark.parametrize("engine", ["pycomm", "gloo"])
def test_wrong_elements_are_told_and_end_in_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    """Wrong elements of pycomm's own ranks are an error; those of peers are a warning."""
    found = replace(sweep(engine), wrong=7)
    monkeypatch.setattr(addresses, "sweep", lambda *_: iter([[found]]))
    path = tmp_path / "a.json"
    args = ["bench", "--offsets", "0,16", "-b", "4K", "-e", "4K", "--json", str(path), "--markdown", "-"]
    assert main.main(args) == (2 if engine == "pycomm" else 0)
    out, err = capsys.readouterr()
    assert "| 2.50 (1.50), 7 wrong |" in out and addresses.line(found).endswith(" 7")
    assert ("7 elements are wrong" in err) == (engine == "pycomm")
    assert ("7 wrong: FAILED" if engine == "pycomm" else "0 wrong: OK") in err
    assert json.loads(path.read_text())["rows"][0]["wrong"] == 7


def test_a_sweep_counts_the_wrong_elements_of_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ranks:
        def order(self, do: str, **order: Any) -> list[Any]:
            """Two ranks, each with one wrong element in every form at every address."""
            forms = [dict.fromkeys(way["forms"], 1) for way in order["variants"]]
            return [[{"forms": of, "algorithm": "a", "default": "a"} for of in forms]] * 2

    monkeypatch.setattr(addresses, "_measure", lambda *_: None)
    [found] = addresses.sweep("all_reduce", Options(2, [4096]), [0, 16], Ranks(), {}, print)  # type: ignore[arg-type]
    assert {of.form: of.wrong for of in found} == {"out_of_place": 8, "in_place": 4}


def test_calls_and_warmup_are_as_asked() -> None:
    asked: list[tuple[int, int, int]] = []

    class Ranks:
        def order(self, do: str, **order: Any) -> list[list[float]]:
            asked.append((order["samples"], order["calls"], order["warmup"]))
            return [[1.0] * order["samples"]] * 2

    form = Form(Ranks(), 0, "out_of_place")  # type: ignore[arg-type]
    engines = Engines(form.ranks, {}, print)
    addresses._measure({"pycomm": [form]}, Options(2, [4096], iterations=5, warmup=0), engines)
    assert asked[-1] == (1, 5, 0)


def test_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "ROUNDS", 2)
    path = tmp_path / "a.md"
    options = ["--offsets", "0,60", "-b", "4K", "-e", "8K", "-f", "2", "-n", "1", "--markdown", str(path)]
    assert main.main(["bench", "all_gather", "barrier", *options, "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["bytes"], row["form"]) for row in rows] == [
        (size, form) for size in (4096, 8192) for form in ("out_of_place", "in_place")
    ]
    by_form = {row["form"]: [tuple(of["offsets"]) for of in row["addresses"]] for row in rows}
    assert by_form == {
        "out_of_place": [(0, 0), (60, 60), (0, 60), (60, 0)],
        "in_place": [(0, 0), (60, 60)],
    }
    assert "| all_gather | in place |" in path.read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--offsets", "2"], "--offsets 2: float32 elements lie at multiples of 4"),
        (["--offsets", "x"], "'x' is not a number of bytes within a page"),
        (["--offsets", "all", "--csv", "a.csv"], "--offsets and --csv"),
        (["--offsets", "all", "--buffers", "symmetric"], "a sweep of addresses uses plain buffers"),
        (["barrier", "--offsets", "all"], "a barrier has no buffers"),
    ],
)
def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], args: list[str], words: str) -> None:
    assert main.main(["bench", *args]) == 2
    assert words in capsys.readouterr().err
