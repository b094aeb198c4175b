import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pycomm import launch, rollcall

RUN = [sys.executable, "-m", "pycomm", "run"]


def patient(notice_s: float, grace_s: float) -> list[str]:
    """The launcher with other waiting times."""
    code = (
        f"from pycomm import launch; launch.NOTICE_S, launch.GRACE_S = {notice_s}, {grace_s}\n"
        "from pycomm.cli.main import main; raise SystemExit(main())"
    )
    return [sys.executable, "-c", code, "run"]


HASTY = patient(0.5, 0.5)  # for processes that must outlast the times


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    def write(code: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(
            "import os, signal, subprocess, sys, time\nrank = int(os.environ['PYCOMM_RANK'])\n" + code
        )
        return str(path)

    return write


def run(*args: str, code: int = 0, command: list[str] = RUN) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*command, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@contextmanager
def started(
    *args: str, ranks: int, command: list[str] = RUN
) -> Iterator[tuple["subprocess.Popen[str]", list[int]]]:
    """Starts a job whose ranks first print their process ids; returns these."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, *args], **pipes, text=True) as job:
        assert job.stdout
        pids = [int(job.stdout.readline().split()[1]) for _ in range(ranks)]
        try:
            yield job, pids
        finally:
            job.kill()
            for pid in pids:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)


def state(pid: int) -> str:
    """R, S, T, Z, ... as in /proc; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def alive(pid: int) -> bool:
    return state(pid) not in ("", "Z")


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
    code = "print(os.getpid())\nif rank == 1: time.sleep(0.5); sys.exit(7)\ntime.sleep(60)"
    start = time.monotonic()
    done = run("-n", "3", script(code), code=7, command=HASTY)
    assert "rank 1 exited with code 7; ending the others" in done.stderr
    assert time.monotonic() - start < 30
    assert gone([int(line.split()[1]) for line in done.stdout.splitlines()], 0)


def test_the_others_may_end_by_themselves(script: Callable[[str], str]) -> None:
    code = """
signal.signal(signal.SIGTERM, lambda *_: print("ended"))
if rank == 1: sys.exit(7)
time.sleep(1)
print("saved")
sys.exit(8)
"""
    done = run("-n", "3", script(code), code=7)
    assert sorted(done.stdout.splitlines()) == ["[0] saved", "[2] saved"]


def test_a_rank_killed_by_a_signal(script: Callable[[str], str]) -> None:
    code = "if rank == 0: os.kill(os.getpid(), signal.SIGKILL)"
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
    done = run("-n", "2", script(code), code=3, command=HASTY)
    assert "killing rank 0" in done.stderr
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


# What a rank does before the signal arrives, so that the signal does not end it.
STUBBORN = {
    "stopped": "",
    "handled": "for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, lambda *_: None)",
    "swallowed": "signal.signal(signal.SIGTERM, signal.default_int_handler)",
}
GO_ON = """
told = False
while True:
    try:
        if not told:
            print(os.getpid())
        told = True
        time.sleep(60)
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", STUBBORN)
def test_a_signal_ends_the_job(script: Callable[[str], str], how: str, number: signal.Signals) -> None:
    code = f"{STUBBORN[how]}\n{GO_ON}"
    with started("-n", "2", script(code), ranks=2, command=HASTY) as (job, pids):
        if how == "stopped":
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            while any(state(pid) != "T" for pid in pids):
                time.sleep(0.01)
        job.send_signal(number)
        assert job.wait(30) == 128 + 9
        assert job.stderr and "killing rank 0, 1" in job.stderr.read()
        assert gone(pids, 0)


def test_a_second_signal_kills_at_once(script: Callable[[str], str]) -> None:
    code = f"{STUBBORN['handled']}\n{GO_ON}"
    with started("-n", "2", script(code), ranks=2, command=patient(3600, 3600)) as (job, pids):
        job.send_signal(signal.SIGINT)
        time.sleep(5 * launch.ECHO_S)
        assert job.poll() is None
        job.send_signal(signal.SIGINT)
        assert job.wait(30) == 128 + 9
        assert gone(pids, 0)


def test_an_interrupt_does_not_wait_as_a_failure_does(script: Callable[[str], str]) -> None:
    """One rank is ended by it, one goes on."""
    code = f"if rank == 0: print(os.getpid()); time.sleep(60)\n{GO_ON}"
    with started("-n", "2", script(code), ranks=2, command=patient(3600, 0.5)) as (job, pids):
        job.send_signal(signal.SIGINT)
        assert job.wait(30) == 130
        assert gone(pids, 0)


def test_nothing_is_left_when_the_launcher_is_killed(script: Callable[[str], str]) -> None:
    with started("-n", "3", script("print(os.getpid())\ntime.sleep(60)"), ranks=3) as (job, pids):
        job.kill()
        assert gone(pids)


def test_a_stopped_rank_is_ended_too(script: Callable[[str], str]) -> None:
    code = "print(os.getpid())\ntime.sleep(60)"
    with started("-n", "2", script(code), ranks=2, command=HASTY) as (job, pids):
        os.kill(pids[0], signal.SIGSTOP)
        os.kill(pids[1], signal.SIGKILL)
        assert job.wait(30) == 128 + 9
        assert gone(pids, 0)


CHILD = "child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)"


def test_what_a_rank_started_ends_with_it_when_it_fails(script: Callable[[str], str]) -> None:
    done = run("-n", "1", script(f"{CHILD}\nprint(child.pid)\nsys.exit(5)"), code=5)
    assert gone([int(done.stdout.split()[1])], 0)


def test_what_a_rank_started_ends_with_it_when_it_is_ended(script: Callable[[str], str]) -> None:
    code = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n{CHILD}\nprint(child.pid)\ntime.sleep(60)"
    with started("-n", "1", script(code), ranks=1) as (job, children):
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) == 0
        assert gone(children, 0)


@pytest.mark.parametrize("code", [0, 5])
def test_what_a_rank_started_outlives_it_when_it_ends_well(script: Callable[[str], str], code: int) -> None:
    """However the job ends."""
    text = f"if rank == 1: time.sleep(1); sys.exit({code})\n{CHILD}\nprint(child.pid)"
    child = int(run("-n", "2", script(text), code=code).stdout.split()[1])
    assert alive(child)
    os.kill(child, signal.SIGKILL)


def test_whoever_holds_the_output_of_a_rank_does_not_hold_up_the_job(script: Callable[[str], str]) -> None:
    child = "child = subprocess.Popen(['sleep', '60']); print(child.pid); sys.stdout.write('unfinished')"
    done = run("-n", "1", script(child), command=HASTY)
    first, second = done.stdout.splitlines()
    assert second == "[0] unfinished"
    os.kill(int(first.split()[1]), signal.SIGKILL)


def test_the_others_may_go_on(script: Callable[[str], str]) -> None:
    code = """
import numpy, pycomm
signal.signal(signal.SIGTERM, lambda *_: print("ended"))
comm = pycomm.init()
if rank == 1: sys.exit(7)
try:
    comm.barrier()
except pycomm.CommError:
    comm = comm.shrink()
time.sleep(1.5)
print("sum", int(comm.all_reduce(numpy.ones(1))[0]))
"""
    done = run("-n", "3", "--on-failure=wait", script(code), code=7, command=HASTY)
    assert sorted(done.stdout.splitlines()) == ["[0] sum 2", "[2] sum 2"]
    assert "rank 1 exited with code 7; the others go on" in done.stderr


@pytest.mark.parametrize("absent", [0, 2])
@pytest.mark.parametrize("calls", [0, 1])
def test_a_rank_that_ends_before_init(script: Callable[[str], str], absent: int, calls: int) -> None:
    """Ranks that wait for it in init() end before the deadline, if it ended before or after they came."""
    code = f"""
import pycomm
for call in range({calls}):
    pycomm.init().barrier()
if rank == {absent}: sys.exit()
if rank == 1: time.sleep(1)
pycomm.init()
"""
    for mode in ("end", "wait"):
        done = run("-n", "3", f"--on-failure={mode}", script(code), code=1, command=HASTY)
        called = "its call 2 of pycomm.init()" if calls else "pycomm.init()"
        assert f"rank {absent} exited with code 0 before {called}, in which rank " in done.stderr
        assert done.stderr.count("exited with code 0") == 1 and "ending the others" in done.stderr


def test_ranks_may_end_one_after_the_other(script: Callable[[str], str]) -> None:
    code = "import pycomm\ncomm = pycomm.init()\ncomm.barrier()\ntime.sleep(rank * 0.3)\nprint('done')"
    done = run("-n", "3", script(code))
    assert done.stdout.count("done") == 3 and not done.stderr


def test_ranks_need_not_communicate(script: Callable[[str], str]) -> None:
    assert not run("-n", "2", script("time.sleep(rank * 0.3)")).stderr


def test_who_else_reports_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(rollcall.Rollcall("test")) as heard:
        rollcall.report("test", 1, 2)
        assert heard.hear() == [(1, 2)]
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # as if it were another user's
        rollcall.report("test", 1, 3)
        assert heard.hear() == []
    rollcall.report("test", 1, 3)  # nobody listens


def test_torch_distributed_finds_its_variables(script: Callable[[str], str]) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    done = run("-n", "2", script(f"print(*[os.environ[name] for name in {names}])"))
    lines = [line.split()[1:] for line in sorted(done.stdout.splitlines())]
    assert [line[:5] for line in lines] == [[r, r, "2", "2", "127.0.0.1"] for r in ("0", "1")]
    assert lines[0][5] == lines[1][5]
    with socket.socket() as free:
        free.bind(("127.0.0.1", int(lines[0][5])))


def test_too_few_open_files(script: Callable[[str], str]) -> None:
    command = ["bash", "-c", 'ulimit -n 100; exec "$@"', "bash", *RUN]
    done = run("-n", "40", script("pass"), code=2, command=command)
    assert re.fullmatch(
        r"pycomm: error: -n 40 needs up to (\d+) open files, and the limit is 100: raise it with"
        r" `ulimit -n \1`.*, or start fewer ranks\n",
        done.stderr,
    )


def test_a_rank_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(launch.StartError, match=r"rank 0 .*temporarily unavailable.*`ulimit -u`"):
        launch.launch(["true"], 1)


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
        (["-n", "2", "python", __file__], "leave out `python`"),
        (["-n", "2", "python3.11", __file__], "leave out `python3.11`"),
        (["-n", "two", __file__], "two"),
        (["-n", "2", "--on-failure", "go", __file__], "wait"),
        ([__file__], "-n"),
        (["-n", "2"], "script"),
    ],
)
def test_usage(args: list[str], words: str) -> None:
    assert words in run(*args, code=2).stderr


@pytest.mark.parametrize(
    "option",
    [["-n", "2"], ["-n2"], ["-np", "2"], ["--np=2"], ["--nproc-per-node", "2"], ["--nproc_per_node=2"]],
)
def test_how_many_ranks(script: Callable[[str], str], option: list[str]) -> None:
    assert sorted(run(*option, script("print('here')")).stdout.splitlines()) == ["[0] here", "[1] here"]


@pytest.mark.parametrize("after", [[], ["-n", "2"], ["--np=2"], ["-negative", "3"]])
def test_how_many_ranks_has_to_be_said_first(script: Callable[[str], str], after: list[str]) -> None:
    path = script("print('here')")
    error = run(path, *after, code=2).stderr
    assert f"rite `pycomm run -n N {path}`" in error
    assert ("comes after the script" in error) == (after[:1] in (["-n"], ["--np=2"]))


def test_a_warning_signal_reaches_the_ranks_and_ends_nothing(script: Callable[[str], str]) -> None:
    path = script(
        "import signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n"
        "print('ready', flush=True)\n"
        "print('got', signal.sigtimedwait([signal.SIGUSR1], 20).si_signo == signal.SIGUSR1)\n"
    )
    job = subprocess.Popen([*RUN, "-n", "2", path], stdout=subprocess.PIPE, text=True)
    assert job.stdout
    assert sorted(job.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=30)
    assert (sorted(out.splitlines()), job.returncode) == (["[0] got True", "[1] got True"], 0)


def test_ignored_children(script: Callable[[str], str]) -> None:
    """SIGCHLD may be ignored, as under a daemon: the kernel would keep no exit code of a rank."""
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
        " os.execv(sys.executable, sys.argv[1:])"
    )
    for code in (0, 3):
        path = script(f"import sys; sys.exit({code})")
        run("-n", "2", path, code=code, command=[sys.executable, "-c", ignoring, *RUN])
