"""How `pycomm bench` prints rows: tables, summaries, markdown and CSV."""

import csv
import io

import pytest
from bench_rows import row
from rich.console import Console

from pycomm.bench import record, report
from pycomm.bench.rows import Options, Row


@pytest.mark.parametrize("peers", [(), ("openmpi", "mpich", "impi", "gloo", "deepspeed")])
@pytest.mark.parametrize("algorithms", [(None,), ("recursive_doubling", "halving_doubling")])
@pytest.mark.parametrize("width", [100, 80])
def test_the_table_fits_and_cuts_no_number(
    peers: tuple[str, ...], algorithms: tuple[str | None, ...], width: int
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
    table = report.Table("all_reduce", options, peers, (), (size, size // 4), width)
    lines = [*table.heading(), *table.lines([found])]
    assert max(map(len, lines)) <= width
    of_engines = table.lines([found])[-1 - len(peers) :]
    assert len({len(line) for line in of_engines}) == 1  # the columns are aligned
    text = "\n".join(lines)
    for number in (str(size), "123456.8", "246913.6", *["7654321"] * bool(peers)):
        assert number in text.split() or f"{number}+" in text.split()
    assert "all_reduce, float32, sum, 2 ranks" in lines[0]
    assert ("ratio" in text) == bool(peers)


def test_a_terminal_of_80_columns_has_no_counts_and_whole_numbers() -> None:
    rows = [
        row(size, 7654.32, dict.fromkeys(("openmpi", "mpich", "gloo-of-a-long-name"), 7e9), dtype=dtype, **of)
        for size in (4, 1 << 30)
        for dtype in ("float32", "float8_e4m3fn")
        for of in ({"ranks": 2}, {"ranks": 16, "algorithm": "my_module:of_a_very_long_name", "forced": True})
    ]
    largest = (64 << 20, 16 << 20)
    table = report.Table("all_reduce", Options(2, [64 << 20]), (), (), largest, width=80)
    [line] = table.lines([row(64 << 20, 7654.32, {})])
    assert line.split()[:2] == [str(64 << 20), "ring"] and str(16 << 20) not in line
    console = Console(file=io.StringIO(), width=80, markup=False)
    report.print_summary(console, rows, ["openmpi", "mpich"])
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    # One peer's four numbers are in one line, for each of four groups and "better MPI".
    whole = [line for line in lines if line.count("x at 4 B") == 2]
    assert len(whole) == 16 and all(line.count("x ") == 4 for line in whole)


def test_groups_of_the_summary_are_named_by_what_differs() -> None:
    def groups(*rows: Row) -> list[str]:
        console = Console(file=io.StringIO(), width=80, markup=False)
        report.print_summary(console, rows, [])
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return [line.strip() for line in text.partition("───")[2].splitlines()[1:] if "x at" not in line][:-1]

    plain, symmetric = (row(64, 1.0, {"gloo": 2.0}, buffers=kind) for kind in ("plain", "symmetric"))
    assert groups(plain) == ["all_reduce"]
    assert groups(plain, symmetric) == ["plain", "symmetric"]
    gathers = row(64, 1.0, {"gloo": 2.0}, collective="all_gather")
    assert groups(plain, symmetric, gathers) == [
        "all_reduce, plain",
        "all_reduce, symmetric",
        "all_gather, plain",
    ]


def test_a_name_that_does_not_fit_stands_on_a_line_of_its_own() -> None:
    peers = ("pycomm-of-the-commit-before", "gloo")
    names = ("mine:of_a_very_long_name_indeed", "ring")
    options = Options(2, [64 << 20], algorithms=names, buffers=("symmetric",))
    table = report.Table("all_reduce", options, peers, (), (64 << 20, 16 << 20), width=80)
    found = row(64 << 20, 7654.32, dict.fromkeys(peers, 7e6), algorithm="of_a_very_long_name_indeed")
    found.buffers = "symmetric"
    lines = table.lines([found])
    assert max(map(len, [*table.heading(), *lines])) <= 80
    words = [line.split()[0] for line in lines]
    assert words == ["of_a_very_long_name_indeed*", str(64 << 20), peers[0], "21000000", "gloo"]
    assert lines[0].split()[1:] == ["symmetric"] and len({len(line) for line in lines[1::2]}) == 1


def test_an_average_is_of_one_way_of_calling() -> None:
    found = [row(4000, 1.0, {}), row(8000, 1.0, {})]  # 4 ranks: 1.5 times 2 and 4, and 4 and 8 GB/s
    assert report.averages(found) == ["average bus bandwidth 6.750 GB/s"]
    found += [row(4000, 1.0, {}, buffers="symmetric"), row(4000, 0.5, {}, forced=True, algorithm="tree")]
    assert report.averages(found) == [
        "average bus bandwidth 6.750 GB/s, the library's choice",
        "average bus bandwidth 4.500 GB/s, the library's choice symmetric",
        "average bus bandwidth 9.000 GB/s, tree",
    ]
    assert report.averages([row(0, 1.0, {}, collective="barrier")]) == []


def test_the_last_line_says_what_was_not_run() -> None:
    names = ["openmpi", "mpich", "gloo", "impi"]
    assert report.closing(0, True) == "0 wrong: OK"
    assert report.closing(0, False) == "not checked"
    assert report.closing(0, True, names[:1]) == "0 wrong, 1 not run (openmpi): OK"
    assert report.closing(0, False, names[:2], True) == "not checked, 2 not run (openmpi; mpich): FAILED"
    assert report.closing(0, True, names).endswith(", 4 not run (openmpi; mpich; gloo; and 1 more): OK")


def test_peers_out_of_place_and_in_place_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """With pycomm as its own peer: the table, the markdown and the CSV keep the two forms apart."""
    found = row(1024, 1.0, {"openmpi": 4.0, "mpich": 8.0})
    text = report.markdown([found], ["openmpi", "mpich"])
    assert (
        "| size | us, out of place | us, in place | better MPI, out of place | better MPI, in place |" in text
    )
    assert "| 1 KiB | 2.00 | 1.00 | 6.00x | 4.00x |" in text
    [line] = csv.DictReader(record.as_csv([found]).splitlines())
    assert (line["openmpi_out_of_place_ratio"], line["openmpi_in_place_ratio"]) == ("6.0", "4.0")
    assert float(line["mpich_in_place_median_us"]) == 8.0


def test_lines_of_csv_tell_cores_and_offsets_apart() -> None:
    found = [row(64, 1.0, {}, cores=(0, 1), offsets=(4, 16)), row(64, 1.0, {}, cores=(0, 2))]
    lines = list(csv.DictReader(record.as_csv(found).splitlines()))
    assert [(line["cores"], line["offsets"]) for line in lines] == [("0,1", "4,16"), ("0,2", "")]
