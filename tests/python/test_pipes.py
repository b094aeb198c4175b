import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

RUN = [sys.executable, "-m", "pycomm", "run"]
# With less time to let go.
HASTY = [
    sys.executable,
    "-c",
    "from pycomm import launch; launch.NOTICE_S = launch.GRACE_S = 0.5\n"
    "from pycomm.cli.main import main; raise SystemExit(main())",
    "run",
]


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    def write(code: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(f"import os, sys, time\nrank = int(os.environ['PYCOMM_RANK'])\n{code}")
        return str(path)

    return write


def output_of(*args: str, code: int = 0) -> bytes:
    done = subprocess.run([*RUN, *args], stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == code
    return done.stdout


@pytest.mark.parametrize("end", ["", "\\n"])
def test_a_long_line(script: Callable[[str], str], end: str) -> None:
    size = 30_000_000
    out = output_of("-n", "1", script(f"sys.stdout.write('x' * {size} + '{end}')"))
    assert out == b"[0] " + b"x" * size + b"\n"


def test_long_lines_of_several_ranks_are_whole(script: Callable[[str], str]) -> None:
    size = 3_000_000
    out = output_of("-n", "3", script(f"for i in range(3): print(str(rank) * {size})"))
    lines = sorted(out.splitlines())
    assert lines == sorted(b"[%d] " % rank + b"%d" % rank * size for rank in (0, 1, 2) for _ in range(3))


def test_a_long_line_that_pauses_holds_up_nobody(script: Callable[[str], str]) -> None:
    """Rank 1 prints more than a pipe holds while rank 0, in the middle of a line, waits for it."""
    code = f"""
done = {tempfile.mktemp()!r}
if rank == 0:
    sys.stdout.write("x" * 200_000); sys.stdout.flush()
    while not os.path.exists(done): time.sleep(0.01)
    os.unlink(done)
else:
    for i in range(30_000): print("a line")
    open(done, "w").close()
"""
    lines = output_of("-n", "2", script(code)).splitlines()
    assert lines.count(b"[1] a line") == 30_000
    assert b"".join(line.removeprefix(b"[0] ") for line in lines if line[:3] == b"[0]") == b"x" * 200_000


def test_bytes_written_one_by_one(script: Callable[[str], str]) -> None:
    code = "for i in range(60_000): os.write(1, b'x')"
    assert output_of("-n", "1", script(code)) == b"[0] " + b"x" * 60_000 + b"\n"


def test_bytes_that_are_no_text(script: Callable[[str], str]) -> None:
    data = bytes(byte for byte in range(256) if byte != 13) * 1000
    code = "os.write(1, bytes(byte for byte in range(256) if byte != 13) * 1000); os.write(1, b'\\n')"
    out = output_of("-n", "1", script(code))
    assert out == b"".join(b"[0] " + line + b"\n" for line in data.split(b"\n"))


def test_carriage_returns(script: Callable[[str], str]) -> None:
    """A progress bar is shown as it moves; a Windows line end counts as one, also in two parts."""
    code = r"os.write(1, b'1%\r2%\r3%\r'); time.sleep(0.3); os.write(1, b'\nwindows\r\nend\n')"
    assert output_of("-n", "1", script(code)) == b"[0] 1%\r[0] 2%\r[0] 3%\r\n[0] windows\r\n[0] end\n"


def test_both_streams_into_one(script: Callable[[str], str]) -> None:
    code = "for i in range(3000): print('out ' + 'x' * 5000); print('err ' + 'y' * 5000, file=sys.stderr)"
    done = subprocess.run(
        [*RUN, "-n", "2", script(code)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60
    )
    assert {line[4:] for line in done.stdout.splitlines()} == {b"out " + b"x" * 5000, b"err " + b"y" * 5000}


def test_a_slow_reader_slows_the_ranks(script: Callable[[str], str], tmp_path: Path) -> None:
    """They stop once the pipes are full, and continue when it reads."""
    counter = tmp_path / "counter"
    code = f"""
for i in range(20_000):
    print("x" * 999)
    with open({str(counter)!r}, "w") as file: file.write(str(i))
sys.exit(3)
"""

    def settled() -> int:
        before, now = -1, -2
        while before != now or now < 0:
            time.sleep(0.5)
            before, now = now, int(counter.read_text() or -1) if counter.exists() else -1
        return now

    with subprocess.Popen([*RUN, "-n", "1", script(code)], stdout=subprocess.PIPE) as job:
        assert job.stdout
        assert settled() < 2_000
        assert len(job.stdout.read()) == 20_000 * len("[0] \n" + "x" * 999)
        assert job.wait(30) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_reader_that_does_not_read_does_not_hold_up_a_signal(
    script: Callable[[str], str], number: signal.Signals
) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    code = "print('x', file=sys.stderr)\nwhile True: print('x' * 99); print('y' * 99, file=sys.stderr)"
    with subprocess.Popen([*HASTY, "-n", "2", script(code)], **pipes) as job:
        assert job.stderr
        job.stderr.readline()
        time.sleep(1)  # until everything is blocked
        job.send_signal(number)
        # Python's traceback waits for the same reader.
        assert job.wait(30) in (128 + number, 128 + signal.SIGKILL)


def test_a_reader_that_comes_late_finds_all(script: Callable[[str], str]) -> None:
    """Even long after the ranks have ended."""
    with subprocess.Popen([*HASTY, "-n", "1", script("print('x' * 200_000)")], stdout=subprocess.PIPE) as job:
        assert job.stdout
        time.sleep(3)
        assert len(job.stdout.read()) == 4 + 200_001
        assert job.wait(30) == 0


def test_an_output_that_does_not_wait(script: Callable[[str], str]) -> None:
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    with subprocess.Popen([*RUN, "-n", "1", script("for i in range(20_000): print(i)")], stdout=sink) as job:
        os.close(sink)
        before, held = b"", bytearray(4)
        while before != held or not any(held):  # until it is full
            before = bytes(held)
            time.sleep(0.5)
            fcntl.ioctl(source, termios.FIONREAD, held)
        with os.fdopen(source, "rb") as file:
            assert file.read() == b"".join(b"[0] %d\n" % i for i in range(20_000))
        assert job.wait(30) == 0


@pytest.mark.parametrize(
    ("where", "why"),
    [("| head -1", "Broken pipe"), ("> /dev/full", "No space left on device"), (">&-", "")],
)
def test_an_output_that_cannot_be_written(script: Callable[[str], str], where: str, why: str) -> None:
    """The output is dropped, with one warning, and the job continues to its end and its exit code."""
    code = "for i in range(50_000): print(i)\nprint('end', file=sys.stderr)\nsys.exit(3)"
    line = f"{' '.join(RUN)} -n 1 {script(code)} {where}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert "[0] end\n" in done.stderr
    assert done.stderr.count("stdout cannot be written") == (1 if why else 0) and why in done.stderr


def test_stderr_that_cannot_be_written(script: Callable[[str], str]) -> None:
    line = f"{' '.join(RUN)} -n 1 {script('print(1, file=sys.stderr); print(2); sys.exit(3)')} 2> /dev/full"
    done = subprocess.run(["bash", "-c", line], stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 3 and done.stdout == b"[0] 2\n"
