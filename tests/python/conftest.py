"""Every test that takes `ranks` runs with rank threads, with real processes, and with messages between nodes."""

import gc
import signal
from collections.abc import Callable
from typing import Any

import processes
import pytest
from hypothesis import settings

import pycomm

# A shell starts what runs in the background with SIGINT ignored, nohup with SIGHUP, and the processes of
# the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long an example takes is no matter of right or wrong.
settings.register_profile("pycomm", deadline=None)
settings.load_profile("pycomm")


def pytest_collection_finish() -> None:
    """What is there by now stays: collections, those of forked ranks above all, need not look at it."""
    gc.freeze()


# How many nodes n rank threads are on; messages between them are late and overtake each other.
_NODES: dict[str, Callable[[int], int]] = {"two nodes": lambda n: min(n, 2), "apart": lambda n: n}


@pytest.fixture(params=["threads", "processes", *_NODES])
def ranks(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """`ranks(fn, n)` is `[fn(comm) for each rank]`."""
    if request.param == "processes":
        return processes.run
    if request.param == "threads":
        return lambda fn, n, timeout=60: pycomm.run_local(fn, n, timeout=timeout)
    nodes = _NODES[request.param]
    return lambda fn, n, timeout=60: pycomm.run_local(fn, n, timeout=timeout, nodes=nodes(n), delays=n)
