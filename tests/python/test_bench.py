"""`pycomm bench`: every collective with its check, and the check itself."""

import csv
import io
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pycomm.bench import measure, peers, record, report
from pycomm.bench.peers import SetError, parse_peers
from pycomm.bench.rows import Options, Row, Times, percentile, summarize
from pycomm.bench.sets import PYCOMM, RankSet
from pycomm.bench.workers import data, memory
from pycomm.bench.workers.data import SHAPES, Case
from pycomm.cli import main
from pycomm.cli.bench_options import checked_dtype, dtypes, size_range

# What a rank's input and output become, said once more and in another way, with NumPy on whole arrays.
Arrays = list[np.ndarray[Any, Any]]


def run_collective(case: Case, xs: Arrays, outs: Arrays) -> None:
    n, count, root = len(xs), case.count, case.root
    slots = [slice(r * count, (r + 1) * count) for r in range(n)]
    if case.collective in ("all_reduce", "reduce_scatter", "reduce"):
        ufunc = {"sum": np.add, "max": np.maximum, "prod": np.multiply}[case.op]
        total = ufunc.reduce(np.stack(xs))
    for rank, out in enumerate(outs):
        if case.collective == "all_reduce" or (case.collective == "reduce" and rank == root):
            out[:] = total
        elif case.collective == "reduce_scatter":
            out[:] = total[slots[rank]]
        elif case.collective == "all_gather" or (case.collective == "gather" and rank == root):
            out[:] = np.concatenate(xs)
        elif case.collective == "broadcast":
            out[:] = xs[root]
        elif case.collective == "scatter":
            out[:] = xs[root][slots[rank]]
        elif case.collective == "all_to_all":
            out[:] = np.concatenate([x[slots[rank]] for x in xs])
        elif case.collective in ("send_recv", "ping_pong", "two_way") or (
            case.collective == "one_way" and rank == 1
        ):
            out[:] = xs[(rank - 1) % n]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint64", "complex64"])
@pytest.mark.parametrize("collective", SHAPES)
def test_the_check_counts_what_is_wrong(collective: str, dtype: str) -> None:
    size, root = (2 if collective in data.POINT_TO_POINT else 3), 1
    for op in ("sum", "prod") if collective in data.REDUCING else ("sum",):
        case = Case(collective, 0 if collective == "barrier" else 30_011, dtype, op, root)
        sent, received = case.elements(size)
        xs = [np.empty(sent, dtype) for _ in range(size)]
        outs = [np.empty(received, dtype) for _ in range(size)]
        for rank, (x, out) in enumerate(zip(xs, outs, strict=True)):
            data.fill(x, case, rank, size)
            data.spoil(out)
        run_collective(case, xs, outs)
        for rank, (x, out) in enumerate(zip(xs, outs, strict=True)):
            assert data.wrong(x, out, case, rank, size) == 0
            untouched = collective in ("gather", "reduce") and rank != root
            if collective == "barrier" or untouched or (collective == "one_way" and rank == 0):
                continue
            for place in (0, 17, received - 1):
                out[place] += 1
            assert data.wrong(x, out, case, rank, size) == 3
            out[[0, 17, received - 1]] -= 1
            x[5] += 1  # the input must stay as it was
            assert data.wrong(x, out, case, rank, size) == 1


def test_a_result_that_was_not_written_is_wrong() -> None:
    case = Case("all_reduce", 1000, "float32")
    x, out = np.empty(1000, "f"), np.empty(1000, "f")
    data.fill(x, case, 0, 2)
    data.spoil(out)
    assert data.wrong(x, out, case, 0, 2) == 1000


def test_a_chunk_at_the_wrong_place_is_wrong() -> None:
    case = Case("broadcast", 1 << 16, "float32")
    x = np.empty(1 << 16, "f")
    data.fill(x, case, 0, 2)
    assert data.wrong(x, np.roll(x, 4096), case, 0, 2) > 60_000


def test_a_little_lost_is_right_and_a_chunk_elsewhere_is_not() -> None:
    case = Case("all_reduce", 1 << 16, "float32")
    x, out = np.empty(1 << 16, "f"), np.empty(1 << 16, "f")
    for rank in range(2):
        data.fill(x, case, rank, 2)
        out[:] = out + x if rank else x
    lossy = out + np.resize(np.float32([-3, 3]), out.size)
    data.fill(x, case, 0, 2)
    assert data.wrong(x, lossy, case, 0, 2) == out.size
    assert data.wrong(x, lossy, case, 0, 2, lossy=True) == 0
    assert data.wrong(x, np.roll(out, 4096), case, 0, 2, lossy=True) > 6_000
    data.spoil(lossy)
    assert data.wrong(x, lossy, case, 0, 2, lossy=True) == out.size


LIAR = """
import runpy
Engine = runpy.run_path({path!r})["Engine"]

class Engine(Engine):
    def bind(self, case, form, variant, x, out):
        text, names = super().bind(case, form, variant, x, out)
        return (text + "; out[2:4] += 1" if self.rank == 1 else text), names
"""


def test_wrong_elements_of_any_rank_are_counted(tmp_path: Path) -> None:
    engine = tmp_path / "liar.py"
    engine.write_text(LIAR.format(path=str(PYCOMM)))
    warnings: list[str] = []
    with RankSet.of_pycomm(2, engine) as ranks:
        options = Options(2, [64], iterations=2)
        [[row]] = measure.measure("all_reduce", options, ranks, {}, warnings.append)
    assert {name: times.wrong for name, times in row.forms.items()} == {"in_place": 2, "out_of_place": 2}
    assert warnings == []


def bench(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> tuple[str, str]:
    assert main.main(["bench", *args]) == code
    return capsys.readouterr()


def test_every_collective(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = ["-b", "8", "-e", "64K", "-f", "8192", "-n", "2", "-w", "1", "--buffers", "plain,symmetric"]
    found = json.loads(bench(capsys, "all", *options, "--json", "-")[0])
    rows = found["rows"]
    assert list(dict.fromkeys(row["collective"] for row in rows)) == list(measure.COLLECTIVES)
    for row in rows:
        assert row["wrong"] == 0, row
        for times in row["forms"].values():
            assert 0 < times["min_us"] <= times["median_us"] <= times["p99_us"], row
            assert 0 < times["call_median_us"] <= times["call_p99_us"], row
            assert times["wait_us"] >= 0 and len(times["samples_us"]) >= measure.REPETITIONS[0], row
        assert row["pycomm_us"] == min(times["median_us"] for times in row["forms"].values())
        assert row["algorithm"], row
        if row["collective"] != "barrier":
            assert row["buffers"] in ("plain", "symmetric")
            assert row["bytes"] in (8, 64 << 10), row
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
    assert out.splitlines()[-1].startswith("average bus bandwidth ") and out.endswith("; 0 wrong: OK\n")
    rows = json.loads(files[0].read_text())["rows"]
    fastest = [form for row in rows if not row["persistent"] for form in row["fastest"]]
    assert sorted(fastest) == ["in_place", "out_of_place"]
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
        (["all_reduce", "--codecs", "int8", "-d", "int32"], "is int32: codecs carry"),
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
    text = " ".join(err.split())
    assert "gloo is left out: /bin/false has no torch: pip install torch" in text
    assert "openmpi is left out: cannot run /nowhere/python" in text


def test_peers_are_measured_beside_us() -> None:
    """With pycomm as its own peer: what is compared is the same, so nothing but the bookkeeping is tested."""
    [peer] = parse_peers("gloo")
    warnings: list[str] = []
    with RankSet.of_pycomm(2) as ours, RankSet.of_pycomm(2) as theirs:
        [row], [larger] = measure.measure(
            "all_gather", Options(2, [64, 4096], iterations=2), ours, {peer: theirs}, warnings.append
        )
    assert list(row.beside) == list(larger.beside) == ["gloo"]
    for form in ("out_of_place", "in_place"):
        ratio = row.beside["gloo"][form].median_us / row.forms[form].median_us
        assert row.ratios["gloo"][form] == ratio
    assert (row.bytes, row.count, larger.bytes, larger.count) == (64, 8, 4096, 512)
    assert warnings == []


def test_a_peer_that_dies_is_left_out() -> None:
    [peer] = parse_peers("gloo")
    warnings: list[str] = []
    with RankSet.of_pycomm(2) as ours, RankSet.of_pycomm(2) as theirs:
        peers = {peer: theirs}
        theirs._processes[1].kill()
        rows = list(measure.measure("barrier", Options(2, [8], iterations=2), ours, peers, warnings.append))
    assert [list(row.beside) for [row] in rows] == [[]]
    assert peers == {}
    assert len(warnings) == 1 and warnings[0].startswith("gloo is left out from here on")


def row(size: int, us: float, peers: dict[str, float], **changes: Any) -> Row:
    """Twice as long out of place, for pycomm and for peers three times."""
    fields = {"collective": "all_reduce", "count": size // 4, "dtype": "float32", "op": "sum", "ranks": 4}
    forms = {"out_of_place": Times([2 * us]), "in_place": Times([us])}
    fields |= {"algorithm": "ring", "buffers": "plain", "persistent": False, "forms": forms}
    beside = {peer: {"out_of_place": Times([3 * us]), "in_place": Times([us])} for peer, us in peers.items()}
    return Row(**{**fields, "bytes": size, "beside": beside, **changes})


def test_summary() -> None:
    rows = [
        row(1024, 2.0, {"openmpi": 4.0, "mpich": 16.0, "gloo": 200.0}),
        row(4096, 1.0, {"openmpi": 8.0, "mpich": 4.0, "gloo": 100.0}),
    ]
    del rows[1].beside["gloo"]["out_of_place"]  # as Gloo, which has no such all_reduce
    summary = summarize(rows, mpis=["openmpi", "mpich"])
    found = {part["peer"]: part["forms"] for part in summary}
    assert list(found) == ["openmpi", "mpich", "gloo", "better MPI"]
    assert math.isclose(found["openmpi"]["in_place"]["geometric_mean"], 4)  # of 2 and 8
    assert math.isclose(found["openmpi"]["out_of_place"]["geometric_mean"], 6)  # of 3 and 12
    assert math.isclose(found["better MPI"]["in_place"]["geometric_mean"], math.sqrt(2 * 4))
    assert found["better MPI"]["in_place"] | {"geometric_mean": 0} == {
        "geometric_mean": 0,
        "min": 2,
        "min_at_bytes": 1024,
    }
    assert found["better MPI"]["out_of_place"]["min"] == 3
    assert math.isclose(found["gloo"]["out_of_place"]["geometric_mean"], 150)  # at the one size
    assert (summary[2]["from_bytes"], summary[2]["to_bytes"]) == (1024, 4096)


def test_the_better_mpi_may_be_another_one_in_each_form() -> None:
    found = row(1024, 1.0, {"openmpi": 4.0, "mpich": 8.0})
    found.beside["mpich"]["out_of_place"] = Times([5.0])
    [*_, better] = summarize([found], mpis=["openmpi", "mpich"])
    assert better["peer"] == "better MPI"
    assert better["forms"]["in_place"]["min"] == 4.0
    assert better["forms"]["out_of_place"]["min"] == 2.5  # MPICH's 5 over pycomm's 2


def test_percentile_is_one_of_the_values() -> None:
    assert percentile([5.0, 1.0, 3.0], 99) == 5.0
    assert percentile([float(n) for n in range(1, 201)], 99) == 198.0
    assert percentile([4.0], 25) == 4.0
    times = Times([1.0, 2.0, 9.0])
    assert times.min_us <= times.median_us <= times.p99_us


@pytest.mark.parametrize(
    ("collective", "factor"),
    [
        ("all_reduce", 1.5),
        ("reduce_scatter", 0.75),
        ("all_gather", 0.75),
        ("all_to_all", 0.75),
        ("broadcast", 1),
        ("reduce", 1),
    ],
)
def test_bandwidths(collective: str, factor: float) -> None:
    found = row(4_000_000, 1000.0, {}, collective=collective)  # 4 MB in a millisecond, 4 ranks
    assert math.isclose(found.algbw(1000), 4)
    assert math.isclose(found.busbw(1000), 4 * factor)


def test_sizes() -> None:
    assert size_range("4", "1K", 4) == [4, 16, 64, 256, 1024]
    assert size_range("1M", "5MiB", 2) == [1 << 20, 2 << 20, 4 << 20]
    small = [(size, case.count) for size, case in measure.cases("all_gather", Options(4, [4, 8, 64]))]
    assert small == [(16, 1), (64, 4)]  # at least one element from each rank


def test_peers_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYCOMM_BENCH_MPI_PYTHON", "/m/python")
    peers = parse_peers("mpi,gloo,openmpi-5=/a/python")
    expected = [
        ("mpi", "/m/python", True),
        ("gloo", sys.executable, False),
        ("openmpi-5", "/a/python", True),
    ]
    assert [(peer.name, peer.python, peer.is_mpi) for peer in peers] == expected


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
        (["all_reduce", "--algorithms", "ring,rign"], "--algorithms rign: there are one_shot"),
        (["--ranks", "0"], "--ranks 0: at least 1"),
        (["-n", "0"], "-n 0: at least 1"),
        (["-n", "-5"], "-n -5: at least 1"),
        (["-w", "-1"], "-w -1: at least 0"),
        (["-g", "2"], "-g 2: say how many ranks there are with --ranks"),
        (["-t", "2"], "-t 2: say how many ranks there are with --ranks"),
        (["barrier", "--plot", "a.png"], "nothing to draw"),
        (["-i", "0"], "-i 0"),
        (["-i", "4", "-f", "2"], "-i 4 -f 2"),
        (["--ranks", "2,x"], "--ranks 2,x: 'x' is no number"),
        (["--offset", "2"], "--offset 2: float32 elements lie at multiples of 4"),
        (["--offset", "4096"], "'4096' is no number of bytes within a page"),
        (["--offset", "0,4,8"], "one number, or two"),
        (["--offsets", "all", "--persistent"], "--offsets and --persistent"),
        (["--columns", "time,mean"], "there is no column 'mean'"),
        (["--algorithms", "no_such_module:star"], "no_such_module:star: No module named"),
        (["--algorithms", "math:pi"], "math:pi is a float, not a pycomm.Algorithm"),
        (["--codecs", "math:pi"], "--codecs math:pi: is a float"),
        (["--csv", "-", "--json", "-"], "standard output holds one of them"),
        (["--vs", "pycomm"], "say which other pycomm"),
        (["--csv", "no/such/place.csv"], "--csv no/such/place.csv: there is no directory no/such"),
        (["--buffers", "pinned"], "--buffers pinned"),
        (["--vs", "nccl"], "--vs nccl"),
        (["--vs", "gloo,gloo"], "twice"),
    ],
)
def test_mistakes_are_named(
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


@pytest.mark.parametrize("peers", [(), ("openmpi", "mpich", "impi", "gloo", "deepspeed")])
@pytest.mark.parametrize("algorithms", [(None,), ("recursive_doubling", "halving_doubling")])
def test_the_table_fits_and_cuts_no_number(
    peers: tuple[str, ...], algorithms: tuple[str | None, ...]
) -> None:
    options = Options(2, [1 << 30], algorithms=algorithms, buffers=("plain", "symmetric"), persistent=True)
    size = 1 << 30
    found = row(
        size,
        123456.78,
        dict.fromkeys(peers, 7654321.0),
        algorithm="recursive_doubling",
        buffers="symmetric",
        persistent=True,
        fastest=["in_place"],
    )
    table = report.Table("all_reduce", options, peers, (), (size, size // 4))
    lines = [*table.heading(), *table.lines([found])]
    assert max(map(len, lines)) <= 100
    of_engines = table.lines([found])[-1 - len(peers) :]
    assert len({len(line) for line in of_engines}) == 1  # the columns are under each other
    text = "\n".join(lines)
    for number in (str(size), "123456.8", "246913.6", *["7654321"] * bool(peers)):
        assert number in text.split() or f"{number}+" in text.split()
    assert "all_reduce, float32, sum, 2 ranks" in lines[0]
    assert ("ratio" in text) == bool(peers)


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


def test_ranks_that_are_late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "START_S", (0.3, 0.0))
    engine = tmp_path / "late.py"
    engine.write_text("import time; time.sleep(60)")
    with pytest.raises(SetError, match="0 of 3 ranks came in the 0 s that a start may take"):
        RankSet.of_pycomm(3, engine)


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

star = pycomm.Algorithm("star", "all_reduce", write)
gentle = pycomm.codecs.Int8(rounding="nearest")
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module in the current directory, of a name that no other test imports."""
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
    assert f"--algorithms {own_module}:star: is one for all_reduce" in err


def test_addresses_are_where_they_were_asked_for() -> None:
    dtype = np.dtype(np.float32)
    for huge in (False, True):
        for offset in (0, 4, 60):
            x = memory.plain(1 << 20, dtype, offset, huge)
            assert (x.ctypes.data % memory.PAGE, x.size, x.dtype) == (offset, 1 << 20, dtype)
    whole = memory.plain(2 * memory.PAGE + 40, np.dtype(np.uint8), 0)
    assert memory.placed(whole, 10, dtype, 16).ctypes.data == whole.ctypes.data + 16


def test_offsets_and_cold_caches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "REPETITIONS", (2, 2))
    options = ["all_gather", "-b", "4K", "-e", "4K", "--offset", "4,60", "--json", "-"]
    [found] = json.loads(bench(capsys, *options)[0])["rows"]
    assert found["offsets"] == [4, 60] and found["wrong"] == 0
    [found] = json.loads(bench(capsys, *options, "--cold")[0])["rows"]
    for times in found["forms"].values():  # a sample is one call, and no call is made beside them
        assert len(times["samples_us"]) == 2 and times["call_median_us"] is None


def test_the_first_byte_of_a_rank_set_is_where_it_was_asked_for(tmp_path: Path) -> None:
    """The engine says what it was given: what the option means is tested where the call is made."""
    engine = tmp_path / "strict.py"
    check = "assert (x.ctypes.data % 4096, out.ctypes.data % 4096) == tuple(variant['offsets'])"
    engine.write_text(LIAR.format(path=str(PYCOMM)).replace("text, names", f"{check}; text, names", 1))
    warnings: list[str] = []
    with RankSet.of_pycomm(2, engine) as ranks:
        options = Options(2, [1 << 16], iterations=1, offsets=(16, 48))
        way = measure.variant((16, 48), forms=["out_of_place"])
        answers = ranks.order(
            "open", case=vars(Case("all_reduce", 100, "float32")), variants=[way], check=False
        )
    assert [list(answer["forms"]) for [answer] in answers] == [["out_of_place"]] * 2, answers
    assert options.offsets == (16, 48) and warnings == []


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
    assert "failed: pycomm's own ranks" in err


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


def test_another_build_is_no_stranger() -> None:
    [other, named] = parse_peers("pycomm=/some/python,pycomm-parent=/")
    assert (other.name, other.python, other.root) == ("pycomm-other", "/some/python", "")
    assert (named.name, named.python, named.root) == ("pycomm-parent", sys.executable, "/")
    [ours] = parse_peers(f"pycomm={Path(__file__).parents[2]}")
    with pytest.raises(SetError, match="the very pycomm that is measured"):
        RankSet.of_peer(ours, 1)


def test_peers_out_of_place_and_in_place_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """With pycomm as its own peer: the table, the markdown and the CSV keep the two forms apart."""
    found = row(1024, 1.0, {"openmpi": 4.0, "mpich": 8.0})
    text = report.markdown([found], ["openmpi", "mpich"])
    assert (
        "| size | us, out of place | us, in place | better MPI, out of place | better MPI, in place |" in text
    )
    assert "| 1 KiB | 2.00 | 1.00 | 6.00x | 4.00x |" in text
    file = io.StringIO()
    record.write_csv([found], file)
    [line] = csv.DictReader(file.getvalue().splitlines())
    assert (line["openmpi_out_of_place_ratio"], line["openmpi_in_place_ratio"]) == ("6.0", "4.0")
    assert float(line["mpich_in_place_median_us"]) == 8.0
