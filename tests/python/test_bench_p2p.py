"""`pycomm bench p2p` and `pycomm bench overlap`."""

import json
import math
import os

import pytest

from pycomm.bench import measure, overlap
from pycomm.bench.overlap import Overlap
from pycomm.bench.rows import Row, Times
from pycomm.cli import bench_cores, main
from pycomm.cli.bench_p2p import checked_cores


def run(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> tuple[str, str]:
    assert main.main([*args]) == code
    return capsys.readouterr()


def test_every_pattern(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "REPETITIONS", (2, 2))
    options = ["-b", "8", "-e", "256K", "-f", "32768", "-n", "1", "-d", "uint8,float32", "--json", "-"]
    rows = json.loads(run(capsys, "bench p2p", *options)[0])["rows"]
    names = ["ping_pong", "one_way", "two_way"]
    assert [(row["collective"], row["bytes"]) for row in rows] == [
        (name, size) for name in names for _ in ("uint8", "float32") for size in (8, 256 << 10)
    ]
    assert not any(row["wrong"] for row in rows)
    assert all(list(row["forms"]) == ["out_of_place"] for row in rows)


def row(collective: str, us: float, cores: tuple[int, int] | None = None) -> Row:
    forms = {"out_of_place": Times([us])}
    return Row(collective, 4000, 4000, "uint8", "none", 2, "direct", "plain", False, forms, cores=cores)


def test_bandwidth_of_both_ways_counts_both() -> None:
    assert math.isclose(row("one_way", 2.0).busbw(2.0), 2.0)  # 4 kB in 2 us: 2 GB/s
    assert math.isclose(row("two_way", 2.0).busbw(2.0), 4.0)


def test_a_time_is_of_one_message() -> None:
    """A ping-pong call is two messages, and a window many."""

    class Ranks:
        def order(self, do: str, **order: object) -> list[list[float]]:
            return [[8.0], [6.0]]  # seconds of 4 calls, by rank

    form = measure.Form(Ranks(), 0, "out_of_place", messages=2)  # type: ignore[arg-type]
    assert form.run(1, 4, 0) == [1.0]


def test_the_matrix_of_cores() -> None:
    rows = [row("ping_pong", us, cores) for us, cores in ((1.5, (0, 1)), (2.5, (0, 4)), (3.5, (1, 4)))]
    lines = bench_cores.matrix(rows, "pycomm", lambda row, us: us)
    assert [line.split() for line in lines] == [
        ["core", "0", "1", "4"],
        ["0", "-", "1.50", "2.50"],
        ["1", "1.50", "-", "3.50"],
        ["4", "2.50", "3.50", "-"],
    ]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a pair has two cores")
def test_pairs_of_cores(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "REPETITIONS", (2, 2))
    first, second = sorted(os.sched_getaffinity(0))[:2]
    options = ["--cores", f"{first},{second}", "-b", "8", "-e", "64K", "-n", "1"]
    out, _ = run(capsys, "bench p2p", *options)
    assert "pycomm: latency of 8 B in us" in out
    assert "pycomm: one-way bandwidth of 65536 B in GB/s" in out


def test_cores_that_cannot_be(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--cores 0-x"):
        checked_cores("0-x")
    with pytest.raises(ValueError, match="may not run on 100000"):
        checked_cores("100000-100001")
    with pytest.raises(ValueError, match="at least two cores are needed"):
        checked_cores(str(min(os.sched_getaffinity(0))))
    with pytest.raises(ValueError, match="at most 4096 numbers"):
        checked_cores("0-99999999")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for args in (["-f", "2"], ["-i", "1M"], ["--columns", "min"], ["one_way"], ["-d", "uint8,int8"]):
        err = run(capsys, "bench p2p", "--cores", "0,1", *args, code=2)[1]
        assert "--cores and " in err and args[-1] in err
    assert "no pattern 'ping'" in run(capsys, "bench p2p", "ping", code=2)[1]


def test_what_overlap_means() -> None:
    def found(together: float) -> Overlap:
        return Overlap("all_reduce", 64, "float32", 2, "pycomm", "in_place", 9.0, 10.0, 10.0, together, 0)

    assert found(20.0).overlap == 0.0  # the two ran one after the other
    assert found(10.0).overlap == 1.0  # the computation hid the call
    assert math.isclose(found(14.0).overlap, 0.6)
    assert (found(35.0).overlap, found(9.0).overlap) == (-1.5, 1.0)  # they slowed each other down; noise


def test_overlap_of_every_collective(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "REPETITIONS", (2, 2))
    out, _ = run(capsys, "bench overlap", "all", "-b", "64K", "-e", "64K", "--json", "-")
    rows = json.loads(out)["rows"]
    assert [row["collective"] for row in rows] == list(overlap.COLLECTIVES)
    for found in rows:
        assert found["wrong"] == 0 and found["overlap"] <= 1
        assert min(found[f"{part}_us"] for part in overlap.PARTS) > 0
    assert "no collective 'barrier'" in run(capsys, "bench overlap", "barrier", code=2)[1]


def test_an_asynchronous_call_that_fails_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "_open", lambda *_: {"error": "RuntimeError: x"})
    err = run(capsys, "bench overlap", "-e", "64K", code=2)[1]
    assert "pycomm, all_reduce, float32: RuntimeError: x" in err
    assert err.endswith("pycomm: error: not run: pycomm, all_reduce, float32\n")
