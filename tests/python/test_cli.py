import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pycomm
from pycomm import _native
from pycomm.bench import machine
from pycomm.cli import info, main, values

OWN = """
import pycomm

def write_hub(b, world):
    if b.rank == 0:
        ranks = range(world.size)
        b.combine([b.out(rank=r) for r in ranks], [b.in_(rank=r) for r in ranks], final=True)
    else:
        b.offer(0, b.in_())
        b.offer(0, b.out())
        b.accept(0, b.in_())
        b.accept(0, b.out())

def write_hasty(b, world):
    others = [r for r in range(world.size) if r != b.rank]
    for peer in others:
        b.offer(peer, b.in_())
    b.combine([b.out()], [b.in_(rank=r) for r in range(world.size) if r != b.rank] or [b.in_()], final=True)
    for peer in others:
        b.accept(peer, b.in_())

hub = pycomm.Algorithm("hub", "all_reduce", write_hub)
hasty = pycomm.Algorithm("hasty", "all_reduce", write_hasty)
rotated = pycomm.codecs.Int4(hadamard=True)
"""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"pycomm {pycomm.__version__}\n"


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["--help"])
    out = capsys.readouterr().out
    for command in ("run", "bench", "bench p2p", "bench overlap", "verify", "explain", "info"):
        assert f"\n    {command}" in out


@pytest.mark.parametrize("command", ["run", "bench", "verify", "explain", "info"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: pycomm {command}" in capsys.readouterr().out


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main([])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("what", "packages"),
    [("pycomm; pycomm.init", ["numpy", "pycomm"]), ("pycomm.cli.run", ["pycomm"])],
    ids=["library", "launcher"],
)
def test_import_needs_numpy_alone(what: str, packages: list[str]) -> None:
    code = (
        f"import sys; before = set(sys.modules); import {what};"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - {'_xxsubinterpreters'};"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == packages


def test_import_leaves_the_command_line_out() -> None:
    code = "import sys, pycomm; pycomm.init; print('argparse' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "False\n"


def test_instruction_set_off_is_the_baseline() -> None:
    code = "from pycomm import _native; print(_native.isa(), _native.available_isas()[-1])"
    for value in ("0", "baseline"):
        environment = {**os.environ, "PYCOMM_ISA": value}
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
        ).stdout
        chosen, baseline = out.split()
        assert chosen == baseline


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = {line[:18].strip(): line[18:] for line in lines}
    assert facts["pycomm"] == pycomm.__version__
    assert facts["instruction set"].startswith(_native.isa())
    assert str(len(os.sched_getaffinity(0))) in facts["cores"]
    assert facts["memfd"] == facts["pidfd"] == "yes"
    assert "GiB available" in facts["memory"]
    assert facts["processor"].startswith(machine.processor().model)
    for name in ("caches", "SMT", "NUMA", "huge pages", "single copy"):
        assert facts[name]
    assert facts["settings"] == "all as by default"


def test_info_for_programs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYCOMM_SPIN_US", "7")
    monkeypatch.setenv("PYCOMM_SPIN_MS", "7")
    monkeypatch.setenv("PYCOMM_SINGLE_COPY", "0")
    assert main.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["PYCOMM_SPIN_US"] == "7" and found["settings"]["PYCOMM_TIMEOUT"] == "600"
    assert found["facts"]["settings"].startswith("PYCOMM_SINGLE_COPY=0, PYCOMM_SPIN_US=7")
    assert found["facts"]["settings"].endswith("PYCOMM_SPIN_MS is not one")
    assert found["facts"]["single copy"] == "no: PYCOMM_SINGLE_COPY=0"
    assert found["processor"]["isa"] == _native.isa()


def test_info_says_how_to_mend_huge_pages_and_single_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "huge_pages", {"enabled": "always", "shmem_enabled": "never"}.get)
    assert info._huge_pages().startswith("always for arrays, never for shared memory; ")
    assert "`echo advise | sudo tee /sys/kernel/mm/transparent_hugepage/shmem_enabled`" in info._huge_pages()
    monkeypatch.setattr(machine, "huge_pages", {"enabled": "always", "shmem_enabled": "advise"}.get)
    assert info._huge_pages() == "always for arrays, advise for shared memory"
    monkeypatch.delenv("PYCOMM_SINGLE_COPY", raising=False)
    monkeypatch.setattr(info, "_read_a_child", lambda: errno.EPERM)
    monkeypatch.setattr(info, "read", lambda path: "2")
    assert "`sudo sysctl kernel.yama.ptrace_scope=1`" in info.single_copy()


def test_a_processor_by_its_numbers() -> None:
    def family(vendor: str, family: int, model: int) -> str:
        return machine._family({"vendor_id": vendor, "cpu family": str(family), "model": str(model)})

    assert family("AuthenticAMD", 25, 1) == "AMD Zen 3"
    assert family("AuthenticAMD", 25, 0x11) == "AMD Zen 4"
    assert family("AuthenticAMD", 26, 2) == "AMD Zen 5"
    assert family("GenuineIntel", 6, 143) == "family 6 model 143"
    assert machine.count("0-3,8") == 5


def test_a_users_own_algorithm(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    name = f"cli_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main.main(["explain", "all_reduce", "100", "--algorithm", f"{name}:hub"]) == 0
    assert "hub" in capsys.readouterr().out
    few = ["--collective", "all_reduce", "--ranks", "1-3", "--counts", "5"]
    assert main.main(["verify", "--algorithm", f"ring,{name}:hub", *few]) == 0
    out = capsys.readouterr().out
    assert "hub" in out and "ring" in out and "wrong" not in out
    assert main.main(["verify", "--algorithm", f"{name}:hasty", *few]) == 1
    assert "hasty all_reduce of 5 float32 (sum) on 2 ranks" in capsys.readouterr().out
    for command in (["verify"], ["explain", "all_reduce", "1"]):
        assert main.main([*command, "--algorithm", f"{name}:nothing"]) == 2
        assert f"{name}:nothing: module" in capsys.readouterr().err
    assert main.main(["explain", "all_reduce", "100", "--codec", f"{name}:rotated"]) == 0
    assert "codec=int4(hadamard, stochastic)" in capsys.readouterr().out
    assert main.main(["explain", "all_reduce", "100", "--codec", f"{name}:write_hub"]) == 2
    assert f"{name}:write_hub is a function, not an object of pycomm.codecs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("1 / 0", "importing {name} raises ZeroDivisionError: division by zero"),
        ("def", "importing {name} raises SyntaxError"),
        ("raise SystemExit(3)", "importing {name} raises SystemExit: 3"),
        (
            f"{OWN}\ndef no(b, world): return {{}}['key']\nhub = pycomm.Algorithm('no', 'all_reduce', no)",
            "KeyError",
        ),
    ],
)
def test_what_a_users_module_raises_is_named(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    words: str,
) -> None:
    name = f"raises_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    commands = [["verify", "--ranks", "2"], ["explain", "all_reduce", "1"]]
    for command in commands:
        assert main.main([*command, "--algorithm", f"{name}:hub"]) == 2
        assert words.format(name=name) in capsys.readouterr().err
    if words != "KeyError":
        for option in ("--algorithms", "--codecs"):
            assert main.main(["bench", option, f"{name}:hub"]) == 2
            assert words.format(name=name) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("numbers", "text"), [(set(), ""), ({3}, "3"), ({0, 1, 2, 3, 8}, "0-3,8"), ({1, 3, 4}, "1,3-4")]
)
def test_ranges(numbers: set[int], text: str) -> None:
    assert info.ranges(numbers) == text


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["explain", "all_reduce", "1000", "float32", "--ranks", "3"]) == 0
    out = capsys.readouterr().out
    assert any(name in out for name in _native.algorithms("all_reduce"))
    assert main.main(["explain", "all_reduce", "1000", "float31"]) == 2
    assert "float31" in capsys.readouterr().err


def test_explain_a_call(capsys: pytest.CaptureFixture[str]) -> None:
    def explain(*args: str, code: int = 0) -> str:
        assert main.main(["explain", *args]) == code
        found = capsys.readouterr()
        return found.err if code else found.out

    expected = pycomm.run_local(
        lambda comm: comm.explain("reduce", 4096, "float16", op="max", algorithm="binomial", root=2), 3
    )[0]
    args = ["--op", "max", "--algorithm", "binomial", "--root", "2", "--ranks", "3"]
    assert explain("reduce", "4K", "half", *args) == expected + "\n"
    ordered = pycomm.run_local(lambda comm: comm.explain("all_reduce", 1 << 20, deterministic=True), 2)[0]
    assert explain("all_reduce", "1M", "--deterministic") == ordered + "\n"
    for nodes, codec in ((1, "int8"), (2, "int8@wire"), (3, "none")):
        named = None if codec == "none" else codec
        expected = pycomm.run_local(
            lambda comm, c=named: comm.explain("all_reduce", 8, codec=c), 4, nodes=nodes
        )
        args = ["--ranks", "4", "--nodes", str(nodes), "--codec", codec]
        assert explain("all_reduce", "8", *args) == expected[0] + "\n"
    for nodes in ("0", "3"):
        assert f"--nodes {nodes}: 2 ranks can be on 1 to 2 nodes" in explain(
            "all_reduce", "4", "--nodes", nodes, code=2
        )
    assert "did you mean 'int8'" in explain("all_reduce", "4", "--codec", "int9", code=2)
    assert "broadcast cannot carry int8" in explain("broadcast", "4", "--codec", "int8", code=2)
    assert "--root 2: the ranks are 0 to 1" in explain("reduce", "4", "--root", "2", code=2)
    assert "--ranks 0" in explain("reduce", "4", "--ranks", "0", code=2)
    assert "'4x' is not a size" in explain("reduce", "4x", code=2)


def test_numbers() -> None:
    assert values.numbers("1-4,8") == [1, 2, 3, 4, 8]
    assert values.numbers("7") == [7]
    with pytest.raises(ValueError, match="'x'"):
        values.numbers("1,x")
    with pytest.raises(ValueError, match="at most 4096 numbers"):
        values.numbers("0-9999999999999999999999")


def test_verify_proves(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    args = ["verify", "--collective", "all_reduce,broadcast", "--ranks", "1-3", "--counts", "0,5"]
    assert main.main(args) == 0
    out = capsys.readouterr().out
    for name in _native.algorithms("all_reduce"):
        assert name in out
    assert "proved" in out and "wrong" not in out


HASTY = """
import pycomm


def write(b, world):
    others = [r for r in range(world.size) if r != b.rank]
    for peer in others:
        b.offer(peer, b.in_())
    b.combine([b.out()], [b.in_(rank=r) for r in range(world.size)], final=True)
    for peer in others:
        b.accept(peer, b.in_())


hasty = pycomm.Algorithm("hasty", "all_reduce", write)
"""


def test_verify_looks_at_calls_in_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An algorithm that is wrong only in place, in symmetric memory: `out` is the `in` that others read."""
    pytest.importorskip("rich")
    (tmp_path / "hasty_module.py").write_text(HASTY)
    monkeypatch.chdir(tmp_path)
    args = ["verify", "--collective", "all_reduce", "--algorithm", "hasty_module:hasty", "--ranks", "2"]
    assert main.main(args) == 1
    assert "symmetric buffers, in place" in " ".join(capsys.readouterr().out.split())


def test_verify_prints_the_counterexample(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")

    def wrong_on_three_ranks(
        algorithm: str, collective: str, size: int, count: int, **_: object
    ) -> str | None:
        return "rank 2 step 4: out[0:16] holds [a], should hold [b]" if size == 3 else None

    monkeypatch.setattr(_native, "verify", wrong_on_three_ranks)
    algorithm = _native.algorithms("all_reduce")[0]
    args = [
        "verify",
        "--collective",
        "all_reduce",
        "--algorithm",
        algorithm,
        "--ranks",
        "2-4",
        "--counts",
        "9",
    ]
    assert main.main(args) == 1
    out = capsys.readouterr().out
    assert f"{algorithm} all_reduce of 9 float32 (sum) on 3 ranks, plain buffers" in out
    assert "rank 2 step 4: out[0:16] holds [a], should hold [b]" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--algorithm", "no_such"], "no_such"),
        (["--algorithm", "ring,rnig"], "--algorithm rnig"),
        (["--ranks", "2,5000"], "--ranks 5000: at most 4096"),
        (["--counts", "0-99999999999"], "at most 4096 numbers"),
        (["--collective", "no_such"], "no_such"),
        (["--ranks", "1-x"], "1-x"),
        (["--ranks", "0"], "--ranks 0: at least 1"),
        (["--ranks", "5-3"], "'5-3'"),
    ],
)
def test_verify_usage(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["verify", *args]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["info", "--ranks", "999999999"],
        ["explain", "all_reduce", "4", "--ranks", "999999999"],
        ["run", "-n", "999999999", "-m", "this"],
    ],
)
def test_so_many_ranks_are_none(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(command) == 2
    assert "999999999: at most 4096" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["PYCOMM_ISA", "PYCOMM_DEBUG"])
def test_info_names_a_variable_that_is_not_understood(name: str) -> None:
    command = [sys.executable, "-m", "pycomm", "info"]
    done = subprocess.run(command, env={**os.environ, name: "foo"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"pycomm: error: {name}='foo' is not understood")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["info", "explain all_reduce 4"])
def test_nobody_has_to_read_on(command: str) -> None:
    for where, code, says in (("| true", 1, ""), ("> /dev/full", 1, "No space left"), (">&-", 0, "")):
        line = f"{sys.executable} -m pycomm {command} {where}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True)
        assert done.returncode == code and says in done.stderr and len(done.stderr.splitlines()) <= 1


def test_what_is_not_installed_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    if importlib.util.find_spec("rich"):
        assert main.main(["bench", "--plot", "a.png"]) == 2
        says = "pycomm bench --plot needs matplotlib: pip install matplotlib"
        assert capsys.readouterr().err == f"pycomm: error: {says}\n"
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    for command in ("bench", "verify"):
        assert main.main([command]) == 2
        assert capsys.readouterr().err == f"pycomm: error: pycomm {command} needs rich: pip install rich\n"


def test_installed_command() -> None:
    command = Path(sys.executable).with_name("pycomm")
    if not command.exists():
        pytest.skip("pycomm is not installed here")
    out = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    assert out == f"pycomm {pycomm.__version__}\n"
