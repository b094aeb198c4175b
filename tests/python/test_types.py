"""The types in the stubs, the names in dir(), and the repr of objects."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import pycomm
from pycomm import Communicator, _native

EXAMPLE = Path(__file__).with_name("typed_example.py")


def test_the_stubs_type_a_callers_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    options = [
        "--strict",
        "--python-executable",
        sys.executable,
        "--cache-dir",
        str(tmp_path),
        "--config-file=",
    ]
    monkeypatch.setenv("MYPYPATH", str(Path(pycomm.__file__).parents[1]))
    out, errors, code = api.run([*options, str(EXAMPLE)])
    assert (code, errors) == (0, ""), out


def test_dir_shows_what_is_meant_to_be_used() -> None:
    assert dir(pycomm) == sorted(pycomm.__all__)
    assert not {"Any", "checks", "objects", "_native"} & set(dir(pycomm))
    assert pycomm.PersistentOp is _native.PersistentOp


def test_calls_show_what_they_are() -> None:
    looked = threading.Event()

    def fn(comm: Communicator) -> None:
        x = np.ones(7, np.float32)
        assert repr(comm.all_reduce_init(x)) == "<pycomm.PersistentOp: all_reduce of 7 float32>"
        if comm.rank == 1:
            assert looked.wait(60)
        works = comm.all_reduce(x, async_op=True), comm.barrier(async_op=True)
        if comm.rank == 0:
            assert repr(works[0]) == "<pycomm.Work: all_reduce of 7 float32, pending>"
            assert repr(works[1]) == "<pycomm.Work: barrier, pending>"
            looked.set()
        works[1].wait()
        assert repr(works[0]) == "<pycomm.Work: all_reduce of 7 float32, done>"

    pycomm.run_local(fn, 2)


def test_a_failed_call_shows_its_error() -> None:
    def fn(comm: Communicator) -> str:
        if comm.rank == 1:
            return ""
        work = comm.all_reduce(np.ones(7, np.float32), async_op=True)
        with pytest.raises(pycomm.PeerLostError):
            work.wait()
        return repr(work)

    assert pycomm.run_local(fn, 2)[0] == "<pycomm.Work: all_reduce of 7 float32, failed: PeerLostError>"
