"""Every test that takes `ranks` runs twice: with rank threads and with real processes.

Tests marked `links` also run with messages between nodes.
"""

import gc
import signal
from collections.abc import Callable
from typing import Any

import processes
import pytest
from hypothesis import settings

import pycomm

# A shell starts background processes with SIGINT ignored, and nohup with SIGHUP ignored; the processes of the
# tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The time that an example takes is no error.
settings.register_profile("pycomm", deadline=None)
settings.load_profile("pycomm")


def pytest_collection_finish() -> None:
    """Freezes existing objects, so that garbage collections, above all in forked ranks, skip them."""
    gc.freeze()


# How many nodes n rank threads are on; messages between nodes are late and overtake each other.
_NODES: dict[str, Callable[[int], int]] = {"two nodes": lambda n: min(n, 2), "apart": lambda n: n}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = any("ranks" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "ranks" in metafunc.fixturenames and not own:
        nodes = _NODES if metafunc.definition.get_closest_marker("links") else ()
        metafunc.parametrize("ranks", ["threads", "processes", *nodes], indirect=True)


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """`ranks(fn, n)` is `[fn(comm) for each rank]`."""
    if request.param == "processes":
        return processes.run
    if request.param == "threads":
        return lambda fn, n, timeout=60: pycomm.run_local(fn, n, timeout=timeout)
    nodes = _NODES[request.param]
    return lambda fn, n, timeout=60: pycomm.run_local(fn, n, timeout=timeout, nodes=nodes(n), delays=n)
