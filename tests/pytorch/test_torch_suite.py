"""How torch's own tests are run and judged (run_torch_suite.py)."""

import ast
import os
import signal
import time
import unittest
from pathlib import Path

import torch_suite
from run_torch_suite import complaints_of, known_differences
from torch_suite import Outcome


class Suite(unittest.TestCase):
    __test__ = False  # pytest leaves it to the tests below

    def test_that_passes(self) -> None:
        os.write(1, b"said\n")  # what pytest does not catch

    def test_that_skips_itself(self) -> None:
        self.skipTest("no such machine")

    def test_that_fails(self) -> None:
        self.assertEqual(1, 2)

    def test_that_crashes(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def test_that_hangs(self) -> None:
        if os.fork() == 0:
            time.sleep(600)
        os.write(1, b"%d" % os.getpgid(0))
        time.sleep(600)


def outcome_of(test: str, log: Path) -> Outcome:
    return torch_suite.run(Suite, test, 2, str(log))


def test_outcomes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert outcome_of("test_that_passes", log) == ("test_that_passes", "passed", "")
    assert log.read_text() == "said\n"
    assert outcome_of("test_that_skips_itself", log)[1:] == ("skipped", "no such machine")
    _, status, reason = outcome_of("test_that_fails", log)
    assert status == "failed" and "AssertionError: 1 != 2" in reason
    assert outcome_of("test_that_crashes", log)[1:] == ("failed", "the test's process ended with -9")


def test_nothing_is_left_of_a_test_that_hangs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert outcome_of("test_that_hangs", log)[1:] == ("failed", "no end within 2 s")
    group = int(log.read_text())
    left = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if group_of(int(pid)) == group]
    assert not left


def group_of(pid: int) -> int | None:
    """None for a process that has ended, reaped or not."""
    try:
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
    except FileNotFoundError:
        return None
    return None if state == "Z" else int(group)


def test_a_backend_is_asked_what_gloo_is() -> None:
    def rewritten(text: str) -> str:
        return ast.unparse(torch_suite._LikeGloo("mine").visit(ast.parse(text)))

    assert rewritten("BACKEND == 'gloo'") == "BACKEND in {'gloo', 'mine'}"
    assert (
        rewritten("BACKEND != 'gloo' and BACKEND != 'nccl'")
        == "BACKEND not in {'gloo', 'mine'} and BACKEND != 'nccl'"
    )
    assert rewritten("BACKEND != 'mpi'") == "BACKEND not in {'mpi', 'mine'}"
    assert rewritten("needs({'gloo'})") == "needs({'gloo', 'mine'})"
    assert (
        rewritten("[dist.Backend.GLOO, dist.Backend.MPI]") == "[dist.Backend.GLOO, dist.Backend.MPI, 'mine']"
    )
    assert rewritten("assertTrue(e.is_async)\nassertTrue(e.count)") == "pass\nassertTrue(e.count)"
    for text in [
        "BACKEND == 'nccl'",
        "BACKEND == 'mpi'",
        "name == 'gloo'",
        "{'nccl'}",
        "new_group(backend='gloo')",
    ]:
        assert rewritten(text) == text


def test_complaints() -> None:
    def outcomes(**statuses: str) -> dict[str, Outcome]:
        return {f"test_{name}": Outcome(f"test_{name}", status, "why") for name, status in statuses.items()}

    passing = {"same": "passed", "known": "passed", "new": "passed", "gone": "passed"}
    gloo = outcomes(**passing, bad="failed", none="skipped", more="skipped")
    ours = outcomes(
        **{**passing, "known": "failed", "new": "skipped"}, bad="failed", none="skipped", more="failed"
    )
    page = "| test | from torch | why |\n|---|---|---|\n| test_known | 2.9 | a reason |\n"
    page += "| test_gone | 2.13 | another |\n"
    assert known_differences(page, "2.9.1") == {"test_known": "a reason"}
    reasons = known_differences(page, "2.13.0+cpu")
    assert reasons == {"test_known": "a reason", "test_gone": "another"}
    new, stale, more = complaints_of(gloo, ours, reasons)
    assert new == "test_new passed on Gloo and skipped on pycomm: why"
    assert stale.startswith("test_gone passed on Gloo and passed on pycomm: take its row from ")
    assert more == "test_more skipped on Gloo and failed on pycomm: why"
    assert complaints_of({}, {}, {}) == ["no test has such a name"]
