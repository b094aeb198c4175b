import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pycomm import launch

RUN = [sys.executable, "-m", "pycomm", "run"]


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    def write(code: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(
            "import os, signal, subprocess, sys, time\nrank = int(os.environ['PYCOMM_RANK'])\n" + code
        )
        return str(path)

    return write


def run(*args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*RUN, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@contextmanager
def started(*args: str, ranks: int) -> Iterator[tuple["subprocess.Popen[str]", list[int]]]:
    """A job whose ranks print their process ids first, and these."""
    with subprocess.Popen([*RUN, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout
        pids = [int(job.stdout.readline().split()[1]) for _ in range(ranks)]
        try:
            yield job, pids
        finally:
            job.kill()
            for pid in pids:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[0] != b"Z"


def gone(pids: list[int], within_s: float = 5) -> bool:
    deadline = time.monotonic() + within_s
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_ranks_know_their_world(script: Callable[[str], str]) -> None:
    code = """
from pycomm.world import find_world
world = find_world()
print(world.launcher, world.rank, world.size, world.address, sys.argv[1:])
"""
    lines = sorted(run("-n", "3", script(code), "--lr", "3", "-n", "7").stdout.splitlines())
    assert len(lines) == 3
    for rank, line in enumerate(lines):
        assert line.startswith(f"[{rank}] pycomm run {rank} 3 pycomm run|")
        assert line.endswith(" ['--lr', '3', '-n', '7']")
    assert len({line.split("|")[1] for line in lines}) == 1


def test_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_module.py").write_text("import sys; print(__name__, sys.argv[1:])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    assert run("-n", "1", "-m", "a_module", "x").stdout == "[0] __main__ ['x']\n"


def test_lines_are_whole_and_streams_apart(script: Callable[[str], str]) -> None:
    code = """
for i in range(300):
    sys.stdout.write(f"out {rank} "); sys.stdout.write("x" * 200); sys.stdout.write(f" {i}\\n")
    sys.stderr.write(f"err {rank} {i}\\n")
sys.stdout.write("no newline at the end")
"""
    done = run("-n", "3", script(code))
    for rank in range(3):
        out = [line for line in done.stdout.splitlines() if line.startswith(f"[{rank}]")]
        assert out == [f"[{rank}] out {rank} {'x' * 200} {i}" for i in range(300)] + [
            f"[{rank}] no newline at the end"
        ]
        err = [line for line in done.stderr.splitlines() if line.startswith(f"[{rank}]")]
        assert err == [f"[{rank}] err {rank} {i}" for i in range(300)]
    assert len(done.stdout.splitlines()) == 3 * 301 and len(done.stderr.splitlines()) == 3 * 300
    assert "\x1b" not in done.stdout


def test_output_comes_as_it_is_printed(script: Callable[[str], str]) -> None:
    with started("-n", "1", script("print(os.getpid())\ntime.sleep(60)"), ranks=1):
        pass  # the line was read while the rank still sleeps


def test_colours_on_a_terminal(script: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = pty.openpty()
    try:
        subprocess.run([*RUN, "-n", "1", script("print('hello')")], stdout=theirs, check=True, timeout=60)
        assert re.fullmatch(rb"\x1b\[\d+m\[0\]\x1b\[0m hello\r\n", os.read(ours, 100))
    finally:
        os.close(ours)
        os.close(theirs)


def test_first_failure_ends_the_others(script: Callable[[str], str]) -> None:
    code = "print(os.getpid())\nif rank == 1: sys.exit(7)\ntime.sleep(60)"
    start = time.monotonic()
    done = run("-n", "3", script(code), code=7)
    assert "rank 1 exited with code 7; ending the others" in done.stderr
    assert time.monotonic() - start < 30
    assert gone([int(line.split()[1]) for line in done.stdout.splitlines()], 0)


def test_a_rank_killed_by_a_signal(script: Callable[[str], str]) -> None:
    code = "if rank == 0: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    done = run("-n", "2", script(code), code=128 + 9)
    assert "rank 0 was ended by signal 9" in done.stderr


def test_a_code_above_128_is_a_code(script: Callable[[str], str]) -> None:
    assert "rank 0 exited with code 200" in run("-n", "1", script("sys.exit(200)"), code=200).stderr


def test_who_does_not_end_is_killed(script: Callable[[str], str]) -> None:
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid())
if rank == 1:
    time.sleep(1)
    sys.exit(3)
time.sleep(60)
"""
    start = time.monotonic()
    done = run("-n", "2", script(code), code=3)
    assert time.monotonic() - start >= launch.GRACE_S
    assert gone([int(line.split()[1]) for line in done.stdout.splitlines()], 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_forwarded_once(script: Callable[[str], str], number: signal.Signals) -> None:
    code = """
count = 0
def handler(number, frame):
    global count
    count += 1
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, handler)
print(os.getpid())
while not count:
    time.sleep(0.01)
time.sleep(0.3)
print("got", count)
sys.exit(40 + count)
"""
    with started("-n", "1", script(code), ranks=1) as (job, pids):
        job.send_signal(number)
        assert job.wait(30) == 41
        assert job.stdout and job.stdout.read() == "[0] got 1\n"
        assert gone(pids, 0)


def test_interrupt_of_ordinary_ranks(script: Callable[[str], str]) -> None:
    with started("-n", "2", script("print(os.getpid())\ntime.sleep(60)"), ranks=2) as (job, pids):
        job.send_signal(signal.SIGINT)
        assert job.wait(30) == 130
        assert gone(pids, 0)


def test_nothing_is_left_when_the_launcher_is_killed(script: Callable[[str], str]) -> None:
    with started("-n", "3", script("print(os.getpid())\ntime.sleep(60)"), ranks=3) as (job, pids):
        job.kill()
        assert gone(pids)


def test_a_stopped_rank_is_ended_too(script: Callable[[str], str]) -> None:
    with started("-n", "2", script("print(os.getpid())\ntime.sleep(60)"), ranks=2) as (job, pids):
        os.kill(pids[0], signal.SIGSTOP)
        os.kill(pids[1], signal.SIGKILL)
        assert job.wait(30) == 128 + 9
        assert gone(pids, 0)


@pytest.mark.parametrize("code", [0, 5])
def test_what_a_rank_started_ends_with_it(script: Callable[[str], str], code: int) -> None:
    child = "print(subprocess.Popen(['sleep', '60']).pid)"
    done = run("-n", "1", script(f"{child}\nsys.exit({code})"), code=code)
    assert gone([int(done.stdout.split()[1])], 0)


def test_a_reader_that_leaves(script: Callable[[str], str]) -> None:
    command = f"{' '.join(RUN)} -n 2 {script('while True: print(rank)')} 2>/dev/null | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"\[[01]\] [01]\n", done.stdout)


def test_stdin_is_empty(script: Callable[[str], str]) -> None:
    assert run("-n", "1", script("print(repr(sys.stdin.read()))")).stdout == "[0] ''\n"


def test_each_rank_has_its_own_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def split(cpus: range, size: int) -> list[set[int]]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cpus))
        return launch.split_cores(size)

    monkeypatch.setattr(launch, "_place", lambda cpu: (0, cpu))
    assert split(range(4), 2) == [{0, 1}, {2, 3}]
    assert split(range(8, 13), 2) == [{8, 9}, {10, 11, 12}]
    assert split(range(2), 3) == [{0, 1}] * 3
    # two packages of two cores of two hardware threads: 0 1 | 2 3 and their second threads 4 5 | 6 7
    monkeypatch.setattr(launch, "_place", lambda cpu: (cpu % 4 // 2, cpu % 4))
    assert split(range(8), 1) == [set(range(8))]
    assert split(range(8), 2) == [{0, 4, 1, 5}, {2, 6, 3, 7}]
    assert split(range(8), 4) == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]
    assert split(range(8), 8) == [{0}, {4}, {1}, {5}, {2}, {6}, {3}, {7}]


def test_pinning(script: Callable[[str], str]) -> None:
    lines = run("-n", "2", script("print(*os.sched_getaffinity(0))")).stdout.splitlines()
    seen = [set(map(int, line.split()[1:])) for line in sorted(lines)]
    assert seen == launch.split_cores(2)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-n", "0", __file__], "-n 0"),
        (["-n", "-3", __file__], "-n -3"),
        (["-n", "2", "no/such/script.py"], "no/such/script.py"),
        (["-n", "two", __file__], "two"),
        ([__file__], "-n"),
        (["-n", "2"], "script"),
    ],
)
def test_usage(args: list[str], words: str) -> None:
    assert words in run(*args, code=2).stderr
