"""`pycomm bench` as a command: its options, its table, what it writes and when."""

import argparse
import csv
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_rows import bench, row

from pycomm.bench import machine, measure, report
from pycomm.bench.rows import Options, Row
from pycomm.bench.sets import RankSet
from pycomm.bench.workers import memory
from pycomm.bench.workers.data import Case
from pycomm.cli import main, output
from pycomm.cli.bench_options import checked_dtype, dtypes


def test_every_collective(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = [
        "-b",
        "8",
        "-e",
        "64K",
        "-f",
        "8192",
        "-n",
        "2",
        "-w",
        "1",
        "--buffers",
        "plain,symmetric,shared",
    ]
    found = json.loads(bench(capsys, "all", *options, "--json", "-")[0])
    rows = found["rows"]
    assert list(dict.fromkeys(row["collective"] for row in rows)) == list(measure.COLLECTIVES)
    for of in rows:
        assert of["wrong"] == 0, of
        for times in of["forms"].values():
            assert 0 < times["min_us"] <= times["median_us"] <= times["p99_us"], of
            assert 0 < times["call_median_us"] <= times["call_p99_us"], of
            assert times["wait_us"] >= 0 and len(times["samples_us"]) >= measure.REPETITIONS[0], of
        assert of["pycomm_us"] == min(times["median_us"] for times in of["forms"].values())
        assert of["algorithm"], of
        if of["collective"] != "barrier":
            assert of["buffers"] in ("plain", "symmetric", "shared")
            assert of["bytes"] in (8, 64 << 10), of
    assert found["summary"] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "op"), [("float16", "avg"), ("bfloat16", "sum"), ("float8_e5m2", "max"), ("uint8", "bxor")]
)
def test_types_and_operators(capsys: pytest.CaptureFixture[str], dtype: str, op: str) -> None:
    pytest.importorskip("ml_dtypes")
    options = ["--ranks", "3", "-b", "4K", "-e", "4K", "-n", "1", "-d", dtype, "-o", op]
    found = json.loads(bench(capsys, "all_reduce", *options, "--json", "-")[0])
    assert [(row["wrong"], row["dtype"], row["op"]) for row in found["rows"]] == [(0, dtype, op)]


def test_algorithms_persistent_and_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / name for name in ("out.json", "out.csv", "out.png")]
    options = ["-b", "1K", "-e", "1K", "-n", "2", "--algorithms", "ring,two_shot", "--persistent"]
    paths = [f"--{path.suffix[1:].replace('png', 'plot')}={path}" for path in files]
    out, _ = bench(capsys, "all_reduce", *options, *paths)
    for word in ("size", "(B)", "#wrong", "busbw", "ring", "two_shot", "two_shot persistent", "GB/s"):
        assert word.strip("()") in out
    averages = [line for line in out.splitlines() if line.startswith("average bus bandwidth ")]
    ways = ["ring", "ring persistent", "two_shot", "two_shot persistent"]
    assert [line.partition(" GB/s, ")[2] for line in averages] == ways
    assert out.endswith("\n0 wrong: OK\n")
    rows = json.loads(files[0].read_text())["rows"]
    fastest = [form for row in rows if not row["persistent"] for form in row["fastest"]]
    assert set(fastest) == {"in_place", "out_of_place"}  # one row each, unless two are equally fast
    ways = [(row["algorithm"], row["persistent"]) for row in rows]
    assert sorted(ways) == [("ring", False), ("ring", True), ("two_shot", False), ("two_shot", True)]
    with files[1].open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["algorithm"], line["persistent"] == "True") for line in lines] == ways
    for line in lines:  # 1 KiB, two ranks
        algbw = 1024 / float(line["in_place_median_us"]) / 1e3
        assert math.isclose(float(line["in_place_algbw"]), algbw)
        assert math.isclose(float(line["in_place_busbw"]), algbw)
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_codecs_beside_none(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-b", "64K", "-e", "64K", "-n", "2", "--codecs", "none,bf16,int8", "--json", "-"]
    for collective in ("all_reduce", "reduce_scatter", "all_gather"):
        rows = json.loads(bench(capsys, collective, *options)[0])["rows"]
        assert [row["codec"] for row in rows] == [None, "bf16", "int8"]
        assert not any(row["wrong"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["all_reduce", "--codecs", "int9"], "int9"),
        (["all_reduce", "--codecs", "int8", "-d", "int32"], "the buffer is int32"),
        (["all_reduce", "--codecs", "int8", "-o", "max"], "max"),
        (["broadcast", "--codecs", "int8"], "broadcast takes no codec"),
        (["all_reduce", "--codecs", "topk"], "pycomm bench codecs"),
    ],
)
def test_codecs_that_cannot_be_measured(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main.main(["bench", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_peer_that_is_missing_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    peers = "gloo=/bin/false,openmpi=/nowhere/python"
    out, err = bench(capsys, "barrier", "-n", "1", "--vs", peers, "--json", "-")
    assert len(json.loads(out)["rows"]) == 1
    assert err.endswith("\n0 wrong, 2 not run (gloo; openmpi): OK\n")
    text = " ".join(err.split())
    assert "gloo is left out: /bin/false has no torch: pip install torch" in text
    assert "openmpi is left out: cannot run /nowhere/python" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["all_reduces"], "no collective 'all_reduces'"),
        (["-b", "4x"], "'4x' is not a size"),
        (["-b", "8", "-e", "4"], "-b 8 -e 4"),
        (["-f", "1"], "-f 1"),
        (["-o", "xor"], "the operators are sum"),
        (["-d", "float33"], "float33"),
        (["-d", "float33", "barrier"], "float33"),
        (["-d", "object"], "-d object: dtype 'object' is not supported"),
        (["-d", "float", "-o", "band"], "op 'band' makes no sense on float32"),
        (["all_reduce", "--algorithms", "ring,rign"], "--algorithms rign: unknown, use one of one_shot"),
        (["--ranks", "0"], "--ranks 0: at least 1"),
        (["-n", "0"], "-n 0: at least 1"),
        (["-n", "-5"], "-n -5: at least 1"),
        (["-w", "-1"], "-w -1: at least 0"),
        (["-g", "2"], "-g 2: say how many ranks there are with --ranks"),
        (["-t", "2"], "-t 2: say how many ranks there are with --ranks"),
        (["barrier", "--plot", "a.png"], "nothing to draw"),
        (["-i", "0"], "-i 0"),
        (["-i", "4", "-f", "2"], "-i 4 -f 2"),
        (["--ranks", "2,x"], "--ranks 2,x: 'x' is not a number"),
        (["--offset", "2"], "--offset 2: float32 elements lie at multiples of 4"),
        (["--offset", "4096"], "'4096' is not a number of bytes within a page"),
        (["--offset", "0,4,8"], "one number, or two"),
        (["--offsets", "all", "--persistent"], "--offsets and --persistent"),
        (["--columns", "time,mean"], "there is no column 'mean'"),
        (["--algorithms", "no_such_module:star"], "no_such_module:star: No module named"),
        (["--algorithms", "math:pi"], "math:pi is a float, not a pycomm.Algorithm"),
        (["--codecs", "math:pi"], "--codecs math:pi: math:pi is a float, not an object of pycomm.codecs"),
        (["--csv", "-", "--json", "-"], "standard output can hold only one of them"),
        (["--vs", "pycomm"], "say which other pycomm"),
        (["--csv", "no/such/place.csv"], "--csv no/such/place.csv: there is no directory no/such"),
        (["--csv", "a", "--json", "./a"], "--json ./a and --csv a: are the same file"),
        (["--csv", "no/{processor}/a.csv"], f"there is no directory no/{machine.slug()}"),
        (["--ranks", "99999999999999999999"], "--ranks 99999999999999999999: at most 4096"),
        (["--ranks=--2"], "'--2' is not a number of ranks"),
        (["-i", "1", "-e", "100G"], "-b 4 -e 100G -i 1: more than 1000 sizes"),
        (["-b", "x"], "-b 'x' is not a size"),
        (["--cold", "-n", "5"], "--cold and -n 5"),
        (["--cold", "-w", "0"], "--cold and -w 0"),
        (["send_recv", "--buffers", "symmetric"], "send_recv is measured in plain buffers only"),
        (["p2p", "--cores", "0-99999999"], "at most 4096 numbers"),
        (["--buffers", "pinned"], "--buffers pinned"),
        (["send_recv", "--buffers", "shared"], "send_recv is measured in plain buffers only"),
        (["--buffers", "shared", "--offset", "0"], "--offset 0 and --buffers shared: pycomm"),
        (["--buffers", "symmetric", "--offset", "0"], "--offset 0 and --buffers symmetric: pycomm"),
        (["--buffers", "plain,symmetric", "--huge"], "--huge and --buffers plain,symmetric: pycomm"),
        (["--vs", "nccl"], "--vs nccl"),
        (["--vs", "gloo,gloo"], "twice"),
    ],
)
def test_mistakes_are_named(  # those of `bench p2p`, too
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    monkeypatch.setattr(RankSet, "of_pycomm", None)  # nothing is started
    out, err = bench(capsys, *args, code=2)
    assert words in err and len(err.splitlines()) == 1
    assert out == ""


@pytest.mark.parametrize(
    ("name", "numpy_name"),
    [
        ("float", "float32"),
        ("half", "float16"),
        ("double", "float64"),
        *((name, name) for name in ("int8", "uint8", "int32", "uint32", "int64", "uint64")),
        ("bfloat16", "bfloat16"),
        ("f8e4m3", "float8_e4m3fn"),
        ("f8e5m2", "float8_e5m2"),
    ],
)
def test_types_as_nccl_tests_has_them(name: str, numpy_name: str) -> None:
    if "8e" in name or name == "bfloat16":
        pytest.importorskip("ml_dtypes")
    assert checked_dtype(name, "sum", ["all_reduce"]) == numpy_name


def test_the_heading_names_the_ranks_and_peers(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = bench(capsys, "barrier", "-n", "1", "-d", "half")
    assert "\n2 ranks\n" in out and "barrier, float16, 2 ranks" in out
    assert report.engines(1, {"pycomm": "pycomm 1"}) == "1 rank"
    versions = {"pycomm": "pycomm 1", "mpi": "Open MPI v5", "gloo": "Gloo of torch 2"}
    assert report.engines(2, versions) == "2 ranks, beside Open MPI v5 (mpi), Gloo of torch 2 (gloo)"


def test_what_a_collective_lacks_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-b", "8", "-e", "8", "-n", "1", "--algorithms", "ring"]
    out, err = bench(capsys, "barrier", "all_reduce", *options, "--json", "-")
    assert [row["collective"] for row in json.loads(out)["rows"]] == ["all_reduce"]
    assert "barrier is left out: it has no algorithm ring" in err
    assert "0 wrong, 1 not run (barrier, algorithm ring): OK" in err
    options = ["-b", "8", "-e", "8", "-n", "1", "--buffers", "symmetric"]
    out, err = bench(capsys, "send_recv", "all_reduce", *options, "--json", "-")
    assert [row["collective"] for row in json.loads(out)["rows"]] == ["all_reduce"]
    assert "send_recv is left out: it has no symmetric buffers" in err
    _, err = bench(capsys, "send_recv", "barrier", "-n", "1", "--ranks", "1", "--json", "-")
    assert "0 wrong, 1 not run (send_recv, " in err
    _, err = bench(capsys, "send_recv", "-n", "1", "--ranks", "1", "--json", "-", code=2)
    assert "pycomm: error: nothing was measured" in err


def test_what_the_kernel_says_about_caches(tmp_path: Path) -> None:
    for number, text in enumerate(["32K\n", "", "16G", "1M", "512"]):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(text)
    assert sorted(memory._sizes(tmp_path)) == [512, 32 << 10, 1 << 20, 16 << 30]


STAR = """
import pycomm

def write(b, world):
    if b.rank == 0:
        ranks = range(world.size)
        b.combine([b.out(rank=r) for r in ranks], [b.in_(rank=r) for r in ranks], final=True)
    else:
        b.offer(0, b.in_())
        b.offer(0, b.out())
        b.accept(0, b.in_())
        b.accept(0, b.out())

def write_wrong(b, world):
    write(b, world)
    b.offer(b.rank - 1, b.in_())

star = pycomm.Algorithm("star", "all_reduce", write)
wrong = pycomm.Algorithm("wrong", "all_reduce", write_wrong)
gentle = pycomm.codecs.Int8(rounding="nearest")
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module in the current directory, with a name that no other test imports."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(STAR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def test_a_users_own_algorithm_and_codec(capsys: pytest.CaptureFixture[str], own_module: str) -> None:
    options = ["-b", "4K", "-e", "4K", "-n", "2", "--json", "-"]
    rows = json.loads(bench(capsys, "--algorithms", f"all,{own_module}:star", *options)[0])["rows"]
    assert "star" in [row["algorithm"] for row in rows] and not any(row["wrong"] for row in rows)
    assert sum(row["default"] for row in rows) == 1
    assert sorted(form for row in rows for form in row["fastest"]) == ["in_place", "out_of_place"]
    rows = json.loads(bench(capsys, "--codecs", f"none,{own_module}:gentle", *options)[0])["rows"]
    assert [row["codec"] for row in rows] == [None, f"{own_module}:gentle"]

    _, err = bench(capsys, "broadcast", "--algorithms", f"{own_module}:star", code=2)
    assert f"--algorithms {own_module}:star: is an algorithm for all_reduce" in err


def test_what_a_users_module_prints_is_no_part_of_an_output(
    capsys: pytest.CaptureFixture[str], own_module: str
) -> None:
    with open(f"{own_module}.py", "a") as file:
        file.write("print('hello')\n")
    options = ["-b", "64", "-e", "64", "-n", "1", "--csv", "-"]
    out, err = bench(capsys, "--algorithms", f"{own_module}:star", *options)
    assert [line["algorithm"] for line in csv.DictReader(out.splitlines())] == ["star"]
    assert err.startswith("hello\n")


def test_what_pycomm_refuses_is_a_failure(capsys: pytest.CaptureFixture[str], own_module: str) -> None:
    options = ["-b", "64", "-e", "1K", "-n", "1", "--json", "a.json"]
    what = f"all_reduce, float32, {own_module}:wrong, plain buffers"
    for others, sizes in (["ring,", [64, 256, 1024]], ["", []]):
        out, err = bench(capsys, "--algorithms", f"{others}{own_module}:wrong", *options, code=2)
        assert out.endswith(f"0 wrong, 1 not run ({what}): FAILED\n")
        assert err.endswith(f"pycomm: error: not run: {what}\n")
        found = json.loads(Path("a.json").read_text())
        assert [row["bytes"] for row in found["rows"]] == sizes
        assert list(found["not_run"]) == [what] and "ValueError" in found["not_run"][what]


@pytest.mark.parametrize("name", ["data", "load", "memory", "worker", "test"])
def test_a_module_may_be_called_as_ours_are(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text(STAR)
    options = ["-b", "64", "-e", "64", "-n", "1", "--json", "a.json", "--algorithms", f"{name}:star"]
    command = [sys.executable, "-m", "pycomm", "bench", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["algorithm"] == "star"


def test_a_module_that_another_hides_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text(STAR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert f"rename {tmp_path}/json.py" in bench(capsys, "--algorithms", "json:star", code=2)[1]


def test_offsets_and_cold_caches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "REPETITIONS", (2, 2))
    options = ["all_gather", "-b", "4K", "-e", "4K", "--offset", "4,60", "--json", "-"]
    [found] = json.loads(bench(capsys, *options)[0])["rows"]
    assert found["offsets"] == [4, 60] and found["wrong"] == 0
    [found] = json.loads(bench(capsys, *options, "--cold")[0])["rows"]
    for times in found["forms"].values():  # a sample is one call, and there are no other calls
        assert len(times["samples_us"]) == 2 and times["call_median_us"] is None


def test_a_run_that_is_interrupted_keeps_its_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measure._measure_case
    calls: list[int] = []

    def second_is_interrupted(*args: Any) -> list[Row]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(measure, "_measure_case", second_is_interrupted)
    files = [tmp_path / name for name in ("out.json", "out.csv", "out.md")]
    paths = ["--json", str(files[0]), "--csv", str(files[1]), "--markdown", str(files[2])]
    out, err = bench(capsys, "-b", "64", "-e", "4K", "-n", "1", *paths, code=130)
    assert "interrupted" in err and "0 wrong: OK" in out
    found = json.loads(files[0].read_text())
    assert [row["bytes"] for row in found["rows"]] == [64] and found["ended"] == "interrupted"
    assert len(files[1].read_text().splitlines()) == 2
    assert "| 64 B |" in files[2].read_text()


def test_what_cannot_be_written_loses_nothing_else(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "measure", lambda *_: iter([[row(64, 1.0, {})]]))
    files = [tmp_path / name for name in ("a.csv", "a.md")]
    options = ["--json", "/dev/full", "--csv", str(files[0]), "--markdown", str(files[1])]
    out, err = bench(capsys, "-b", "64", "-e", "64", *options, code=1)
    assert "not written: --json /dev/full: No space left on device" in err and "0 wrong: OK" in out
    assert all(file.read_text() for file in files)


SHELL = f"{sys.executable} -m pycomm bench -b 64 -e 1K -n 1 --csv a.csv --json a.json"


@pytest.mark.parametrize(
    ("streams", "code", "ended"),
    [
        ("> /dev/full", 130, "interrupted"),
        ("| true; exit ${PIPESTATUS[0]}", 130, "interrupted"),
        ("2> /dev/full", 0, "complete"),
        (">&- 2>&-", 0, "complete"),
        ("<&-", 0, "complete"),
    ],
)
def test_streams_that_are_closed_or_full_lose_no_file(
    tmp_path: Path, streams: str, code: int, ended: str
) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{SHELL} {streams}"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=100
    )
    assert done.returncode == code and "Traceback" not in done.stderr and "Exception" not in done.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["ended"] == ended and len((tmp_path / "a.csv").read_text().splitlines()) >= 2
    assert found["rows"][0]["wrong"] == 0
    assert ended == "complete" or "not written: the tables: " in done.stderr


def test_json_that_nobody_reads_loses_no_file(tmp_path: Path) -> None:
    line = f"{SHELL} --json - | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 1 and "not written: --json -: Broken pipe" in done.stderr
    assert "Exception" not in done.stderr
    assert len((tmp_path / "a.csv").read_text().splitlines()) >= 2


def test_a_terminal_that_hangs_up_interrupts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs_up(*_: Any) -> Iterator[list[Row]]:
        yield [row(64, 1.0, {})]
        signal.raise_signal(signal.SIGHUP)

    before = signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr(measure, "measure", hangs_up)
    bench(capsys, "-b", "64", "-e", "64", "--csv", str(tmp_path / "a.csv"), code=130)
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2
    assert signal.getsignal(signal.SIGHUP) == before


def test_ranks_that_die_late_leave_the_rows_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measure._measure_case
    calls: list[int] = []

    def second_kills(size: int, case: Case, options: Options, engines: measure.Engines) -> list[Row]:
        calls.append(1)
        if len(calls) == 2:
            engines.ours._processes[1].kill()
        return measured(size, case, options, engines)

    monkeypatch.setattr(measure, "_measure_case", second_kills)
    out, err = bench(capsys, "-b", "64", "-e", "4K", "-n", "1", "--csv", "-", code=2)
    assert [line["bytes"] for line in csv.DictReader(out.splitlines())] == ["64"]
    assert "failed: pycomm's own ranks" in err and "0 wrong: FAILED" in err


def test_what_a_record_holds(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(bench(capsys, "barrier", "--ranks", "1,2", "-n", "1", "--json", "-")[0])
    assert found["command"].startswith("pycomm") and found["time"].endswith("Z")
    assert found["settings"]["collective"] == ["barrier"] and "environment" in found["settings"]
    assert found["processor"]["model"] and found["processor"]["isa"]
    assert all(cache["bytes"] > 0 for cache in found["processor"]["caches"])
    assert found["ended"] == "complete" and found["versions"]["pycomm"].startswith("pycomm ")
    assert [row["ranks"] for row in found["rows"]] == [1, 2]


def test_steps_types_and_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-b", "1K", "-e", "3K", "-i", "1K", "-n", "1", "-d", "half,uint8"]
    out, _ = bench(capsys, "all_gather", *options)
    lines = out.splitlines()
    sizes = [line.split()[0] for line in lines if line.strip()[:4] in ("1024", "2048", "3072")]
    assert sizes == ["1024", "2048", "3072"] * 2
    assert "all_gather, float16, 2 ranks" in lines and "all_gather, uint8, 2 ranks" in lines
    assert lines[-1].endswith("0 wrong: OK")
    every = dtypes("all", "bxor", ["all_reduce"])
    assert "int8" in every and "float32" not in every
    assert {"float32", "bool", "complex64"} <= set(dtypes("all", "sum", ["all_gather"]))


def test_types_that_are_not_installed_are_named() -> None:
    code = "import sys; sys.modules['ml_dtypes'] = None; from pycomm.cli.bench_options import dtypes;"
    for op, says in (("sum", "bfloat16, float8_e4m3fn, float8_e5m2"), ("band", "")):
        command = [sys.executable, "-c", f"{code} print(dtypes('all', {op!r}, ['all_reduce']))"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "'int8'" in done.stdout and "bfloat16" not in done.stdout
        line = f"pycomm: warning: -d all leaves out {says}, which NumPy lacks: pip install ml_dtypes\n"
        assert done.stderr == (line if says else "")


def test_a_directory_may_be_named_by_the_processor(tmp_path: Path) -> None:
    (tmp_path / machine.slug()).mkdir()
    args = argparse.Namespace(csv=str(tmp_path / "{processor}" / "a.csv"))
    output.check(args, "pycomm bench")
    assert output.write(args, {"csv": lambda path: output.write_text(path, "x")}) == []
    assert (tmp_path / machine.slug() / "a.csv").read_text() == "x\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_may_not_be_written_is_named_before(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="may not be written"):
        output.check(argparse.Namespace(csv=str(tmp_path / "a.csv")), "pycomm bench")


def test_text_has_neither_markup_nor_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    output.console(sys.stdout).print("load:star: nothing[/]x [red]y[/]")
    assert capsys.readouterr().out == "load:star: nothing[/]x [red]y[/]\n"
