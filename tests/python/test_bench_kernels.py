"""`pycomm bench kernels`: its figures from measurements, and its options."""

import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pycomm import _native
from pycomm.bench import kernels, lossless_cases, pack_cases, shapes
from pycomm.bench.kernels import Call, Case
from pycomm.cli import main


class Clock:
    """A device on which every call takes as many seconds as it returns."""

    def describe(self) -> str:
        return "a clock"

    def copies(self, size: int) -> dict[str, Call]:
        return {"slow": lambda: size * 2e-9, "fast": lambda: size * 1e-9}

    def seconds(self, call: Call, calls: int) -> float:
        return calls * float(call())  # type: ignore[arg-type]


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(device: kernels.Device, workloads: list[str]) -> Iterator[Case]:
        for workload in workloads:
            rivals: dict[str, Call] = {"a": lambda: 4e-3, "b": lambda: 3e-3}
            yield Case("toy", "with rivals", workload, 2_000_000, lambda: 2e-3, rivals)
            yield Case("toy", "alone", workload, 2_000_000, lambda: 1e-3, ratio=0.625)

    module = types.ModuleType("toy_cases")
    module.cases = cases  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_cases", module)
    monkeypatch.setattr(kernels, "FAMILIES", {"toy": "toy_cases"})
    monkeypatch.setattr(kernels, "DEVICES", {"cpu": Clock})


def test_shares_and_speedups(family: None) -> None:
    first, second = kernels.measure(Clock(), ["toy"], ["resnet50"])
    assert first.share == pytest.approx(0.5)  # share of the fast copy: a million bytes in a millisecond
    assert first.gbps == pytest.approx(1)
    assert (first.fastest_rival, first.speedup) == ("b", pytest.approx(1.5))
    assert second.share == pytest.approx(1)
    assert second.fastest_rival is None and second.speedup is None


def test_the_command(family: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, chart = tmp_path / "r.json", tmp_path / "p.png"
    arguments = ["bench", "kernels", "--workloads", "resnet50", "--json", str(report), "--plot", str(chart)]
    assert main.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "a clock" in shown and "b 3000, 1.50x" in shown and "50%" in shown and "0.625" in shown
    rows = json.loads(report.read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["with rivals", "alone"]
    assert rows[0]["share"] == pytest.approx(0.5)
    assert rows[0]["rivals"]["a"]["min_us"] == pytest.approx(4000)
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert main.main(["bench", "kernels", "toy", "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2 * len(shapes.MODELS)
    for wrong, message in (
        (["boy"], "there is no family 'boy': toy"),
        (["--workloads", "vgg"], "--workloads: there is no 'vgg': resnet50, gpt2_small"),
        (["--device", "tpu"], "--device: there is no 'tpu': cpu"),
        (["--plot", "/nowhere/p.png"], "there is no directory /nowhere"),
    ):
        assert main.main(["bench", "kernels", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_cases_of_pack_do_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on a small model, with torch's ways if torch is installed."""
    small = [shapes.Parameter("a", (300, 7)), shapes.Parameter("b", (5,)), shapes.Parameter("c", (1025,))]
    monkeypatch.setattr(shapes, "parameters", lambda model: small)
    count = 0
    for case in pack_cases.cases(Clock(), ["resnet50"]):
        stats = case.run()
        for call in case.rivals.values():
            call()
        elements = 300 * 7 + 5 + 1025
        itemsize = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
        words = case.kernel.replace(",", "").split()
        assert case.bytes == elements * (itemsize[words[1]] + itemsize[words[3]])
        if "statistics" in case.kernel:
            values = np.concatenate([pack_cases.numbers(p.count, i) for i, p in enumerate(small)])
            want = ((values.astype(np.float64) / 8) ** 2).sum()
            assert stats.sum_squares == pytest.approx(want, rel=1e-12)  # type: ignore[attr-defined]
        count += 1
    assert count == 5 * len(pack_cases.CASTS)


def test_the_cases_of_lossless_do_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ml_dtypes")
    small = [shapes.Parameter("a", (7,)), shapes.Parameter("b", (300, 70))]
    monkeypatch.setattr(shapes, "parameters", lambda model: small)
    encode, decode = lossless_cases.cases(Clock(), ["resnet50"])
    size = encode.run()
    assert decode.run() == size  # all that was encoded
    assert encode.bytes == decode.bytes == 2 * 21000 + size  # type: ignore[operator]
    assert encode.ratio == size / 42000 < 0.68  # type: ignore[operator]
    (compress,), (decompress,) = encode.rivals.values(), decode.rivals.values()
    wanted = pack_cases.numbers(21000, 0).astype(_native.numpy_dtype("bfloat16"))
    assert decompress().tobytes() == wanted.tobytes()  # type: ignore[attr-defined]
    exponents, rest = compress()  # type: ignore[misc]
    assert f"({(len(exponents) + len(rest)) / 42000:.3f} of the bytes)" in next(iter(encode.rivals))


def test_the_cpu_is_one_core_and_copies_all() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        device = kernels.Cpu()
        assert len(os.sched_getaffinity(0)) == 1
        for size in (100, 5 << 20):
            for call in device.copies(size).values():
                call()
                dst, src = device._memory
                assert dst.size >= size and np.array_equal(dst[:size], src[:size])
                dst.fill(0)
    finally:
        os.sched_setaffinity(0, allowed)
    with pytest.raises(ValueError, match="`out` has 3 bytes and `x` 4"):
        _native.copy_bytes(np.zeros(3, "u1"), np.zeros(4, "u1"))
