"""How torch before 2.14 takes a backend that is written in Python: as a process group of its own.

Such a group stands in place of torch's own, and has no backend for each device: `_get_backend(device)` finds
none. monitored_barrier, which only Gloo has, is refused.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore
from torch.distributed import ProcessGroup as _TorchProcessGroup

import pycomm
from pycomm.torch.collectives import Collectives

NAME = "pycomm"


class ProcessGroup(Collectives, _TorchProcessGroup):  # type: ignore[misc]  # torch is not typed here
    def __init__(self, comm: pycomm.Communicator, store: Any, timeout: timedelta) -> None:
        _TorchProcessGroup.__init__(self, comm.rank, comm.size)
        Collectives.__init__(self, comm, timeout)
        self._store = store
        self._group_name = self._group_desc = ""
        # The device alone, so that torch knows whose tensors the group takes.
        self._register_backend(torch.device("cpu"), _TorchProcessGroup.BackendType.CUSTOM, None)

    # Called by C++: functional collectives, DeviceMesh and FSDP2 look up a group by its name.

    def getBackendName(self) -> str:
        return NAME

    def getRank(self) -> int:
        return self._comm.rank

    def getSize(self) -> int:
        return self._comm.size

    def setGroupName(self, name: str) -> None:
        self._group_name = name

    def getGroupName(self) -> str:
        return self._group_name

    def setGroupDesc(self, desc: str) -> None:
        self._group_desc = desc

    def getGroupDesc(self) -> str:
        return self._group_desc

    # Called by Python

    def get_group_store(self) -> Any:
        return self._store

    def shutdown(self) -> None:
        self.close()

    def abort(self) -> None:
        """For the other ranks: what they wait for will not come."""
        self._comm.leave("the process group was aborted")

    def monitored_barrier(self, *args: Any, **more: Any) -> None:
        raise RuntimeError(
            "monitored_barrier is Gloo's: call barrier(), whose error names the rank that is missing"
        )


def create(store: Any, rank: int, size: int, timeout: timedelta) -> ProcessGroup:
    """Joins the group's other ranks, whom it meets at `store`."""
    _refuse_other_backends()
    # A store may outlive a group, and the next group of that name would find what the last one left there.
    turn = store.add(f"pycomm/{rank}", 1)
    comm = pycomm.init(
        store=PrefixStore(f"pycomm/{turn}", store), rank=rank, size=size, timeout=timeout.total_seconds()
    )
    return ProcessGroup(comm, store, timeout)


def register() -> None:
    backend = torch.distributed.Backend
    if NAME.upper() not in backend._plugins:
        backend.register_backend(
            NAME, create, devices=["cpu"]
        )  # a list: of a string it would take the letters


def _refuse_other_backends() -> None:
    """A group that is written in Python is the whole group: torch would drop "cuda:nccl" in silence.

    What was asked for stands in torch's function that calls create(), and nowhere else.
    """
    config = sys._getframe(2).f_locals.get("backend_config")
    backends = getattr(config, "device_backend_map", {})
    others = [f"{device}:{backend}" for device, backend in backends.items() if backend != NAME]
    if others:
        raise ValueError(
            f"torch {torch.__version__} would drop {', '.join(others)} beside {NAME}: make a group for each,"
            f' as with init_process_group("{NAME}") and new_group(backend="nccl")'
        )
