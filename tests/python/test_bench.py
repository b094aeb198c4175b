"""`pycomm bench`: the check of results, the ranks and peers, the figures."""

import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bench_rows import row

from pycomm import _native
from pycomm.bench import measure, peers
from pycomm.bench.peers import SetError, parse_peers
from pycomm.bench.rows import Options, Times, percentile, summarize
from pycomm.bench.sets import PYCOMM, WORKERS, RankSet
from pycomm.bench.workers import data, memory
from pycomm.bench.workers.data import SHAPES, Case
from pycomm.cli.bench_options import size_range

# An independent definition of a rank's input and output, with NumPy on whole arrays.
Arrays = list[np.ndarray[Any, Any]]


def test_no_collective_is_left_out() -> None:
    assert set(SHAPES) - set(data.POINT_TO_POINT) == set(_native.COLLECTIVES)
    assert set(data.ROOTED) == set(_native.ROOTED)


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
            x[5] += 1  # the input must not change
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


def test_peers_are_measured_beside_us() -> None:
    """With pycomm as its own peer both sides are the same, so this tests only the bookkeeping."""
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
    assert len(warnings) == 1 and str(warnings[0]).startswith("gloo is left out from here on")


def test_summary() -> None:
    rows = [
        row(1024, 2.0, {"openmpi": 4.0, "mpich": 16.0, "gloo": 200.0}),
        row(4096, 1.0, {"openmpi": 8.0, "mpich": 4.0, "gloo": 100.0}),
    ]
    del rows[1].beside["gloo"]["out_of_place"]  # like Gloo, which has no such all_reduce
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
    assert math.isclose(found["gloo"]["out_of_place"]["geometric_mean"], 150)  # at the only size
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


def test_ranks_that_are_late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "START_S", (0.3, 0.0))
    engine = tmp_path / "late.py"
    engine.write_text("import time; time.sleep(60)")
    with pytest.raises(SetError, match="0 of 3 ranks started within 0 s"):
        RankSet.of_pycomm(3, engine)


def test_addresses_are_where_they_were_asked_for() -> None:
    dtype = np.dtype(np.float32)
    for huge in (False, True):
        for offset in (0, 4, 60):
            x = memory.plain(1 << 20, dtype, offset, huge)
            assert (x.ctypes.data % memory.PAGE, x.size, x.dtype) == (offset, 1 << 20, dtype)
    whole = memory.plain(2 * memory.PAGE + 40, np.dtype(np.uint8), 0)
    assert memory.placed(whole, 10, dtype, 16).ctypes.data == whole.ctypes.data + 16


def test_the_first_byte_of_a_rank_set_is_where_it_was_asked_for(tmp_path: Path) -> None:
    """The engine reports what it was given; another test covers the meaning of the option."""
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


def test_another_build_is_no_stranger() -> None:
    [other, named] = parse_peers("pycomm=/some/python,pycomm-parent=/")
    assert (other.name, other.python, other.root) == ("pycomm-other", "/some/python", "")
    assert (named.name, named.python, named.root) == ("pycomm-parent", sys.executable, "/")
    [ours] = parse_peers(f"pycomm={Path(__file__).parents[2]}")
    with pytest.raises(SetError, match="the pycomm that it is compared with"):
        RankSet.of_peer(ours, 1)


class NamedMpi:
    """Stands in for mpi4py.MPI; its constants are their own names."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(Waitall=None) if name == "Request" else name


@pytest.mark.parametrize("collective", [name for name in SHAPES if name not in data.POINT_TO_POINT])
def test_mpi_moves_the_bytes_of_a_type_that_it_cannot_reduce(
    monkeypatch: pytest.MonkeyPatch, collective: str
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=NamedMpi()))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "data", data)
    engine_type = runpy.run_path(str(WORKERS / "engine_mpi.py"))["Engine"]
    engine = engine_type.__new__(engine_type)
    engine.rank, engine.comm = 0, SimpleNamespace(size=2)

    def bound(dtype: str, form: str) -> Any:
        x, out = np.ones(4, dtype), np.ones(4, dtype)
        return x, engine.bind(Case(collective, 2, dtype), form, {}, x, out)

    for form in ("out_of_place", "in_place"):
        x, found = bound("float32", form)
        if found is None:
            continue
        assert found[1]["x"][0] is x and found[1]["x"][1] == "FLOAT"
        if collective in data.REDUCING:
            with pytest.raises(TypeError, match="MPI has no type float16"):
                bound("float16", form)
        else:
            x, (_, names) = bound("float16", form)
            assert names["x"][1] == names["out"][1] == "BYTE"
            assert names["x"][0].nbytes == x.nbytes and np.shares_memory(names["x"][0], x)
