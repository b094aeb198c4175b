"""How torch before 2.14 takes a backend that is written in Python: as a process group of its own.

Such a group stands in place of torch's own, and has no backend for each device: `_get_backend(device)` finds
none, and what needs one is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from inspect import Parameter, Signature
from types import FrameType
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d
from torch.distributed import ProcessGroup as _TorchProcessGroup

import pycomm
from pycomm.autoload import NAME
from pycomm.torch.member import Member
from pycomm.torch.uncompiled import uncompiled


class ProcessGroup(Member, _TorchProcessGroup):  # type: ignore[misc]  # torch is not typed here
    def __init__(self, comm: pycomm.Communicator, store: Any, timeout: timedelta) -> None:
        _TorchProcessGroup.__init__(self, comm.rank, comm.size)
        Member.__init__(self, comm, store, timeout)
        self._group_name = self._group_desc = ""
        # The device alone, so that torch knows whose tensors the group takes.
        self._register_backend(torch.device("cpu"), _TorchProcessGroup.BackendType.CUSTOM, None)

    @classmethod
    def join(cls, store: Any, rank: int, size: int, timeout: timedelta) -> Member:
        _refuse_other_backends()
        return super().join(store, rank, size, timeout)

    # Called by C++: functional collectives, DeviceMesh and FSDP2 look up a group by its name.

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

    def monitored_barrier(self, *args: Any, **more: Any) -> None:
        raise RuntimeError(
            "monitored_barrier is Gloo's: call barrier(), whose error names the rank that is missing"
        )

    def split_group(self, *args: Any, **more: Any) -> None:  # torch's own would follow a null pointer
        raise RuntimeError("split_group needs a backend for each device, as of torch 2.14: call new_group()")


def _in_every_form(name: str, tensors: int, options: type, **fields: str) -> Callable[..., Any]:
    """The call with its `opts`, and as torch's own group takes it besides: `group.broadcast(x, 0)`.

    Such a form has so many `tensors` arguments, then what goes into `fields` of the options, then a timeout.
    """
    ours = getattr(Member, name)
    fields["timeout"] = "timeout"
    short = Signature([Parameter(each, Parameter.POSITIONAL_OR_KEYWORD, default=None) for each in fields])

    def call(self: ProcessGroup, *args: Any, **more: Any) -> Any:
        if args and not more and type(args[-1]) is options:  # as torch.distributed calls it, and often
            return ours(self, *args)
        if "opts" in more:
            return ours(self, *args, **more)
        opts = options()
        for field, value in short.bind(*args[tensors:], **more).arguments.items():
            if value is not None:
                setattr(opts, fields[field], value)
        given: Sequence[Any] = args[:tensors]
        if tensors <= 2 and any(isinstance(each, torch.Tensor) for each in given):
            given = [[each] for each in given]
        return ours(self, *given, opts)

    return call


for _name, _tensors, _options, _fields in (
    ("allgather", 2, c10d.AllgatherOptions, {}),
    ("_allreduce", 1, c10d.AllreduceOptions, {"op": "reduceOp"}),
    ("all_to_all_single", 4, c10d.AllToAllOptions, {}),
    ("alltoall_base", 4, c10d.AllToAllOptions, {}),
    ("barrier", 0, c10d.BarrierOptions, {}),
    ("broadcast", 1, c10d.BroadcastOptions, {"root": "rootRank"}),
    ("gather", 2, c10d.GatherOptions, {"root": "rootRank"}),
    ("reduce", 1, c10d.ReduceOptions, {"root": "rootRank", "op": "reduceOp"}),
    ("reduce_scatter", 2, c10d.ReduceScatterOptions, {"op": "reduceOp"}),
    ("scatter", 2, c10d.ScatterOptions, {"root": "rootRank"}),
):
    setattr(ProcessGroup, _name, _in_every_form(_name, _tensors, _options, **_fields))
uncompiled(ProcessGroup)


def _refuse_other_backends() -> None:
    """A group that is written in Python is the whole group: torch would drop "cuda:nccl" in silence.

    What was asked for stands in the function of torch that makes the group, and nowhere else.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_new_process_group_helper":
        frame = frame.f_back
    config = frame.f_locals.get("backend_config") if frame is not None else None
    backends = getattr(config, "device_backend_map", {})
    others = [f"{device}:{backend}" for device, backend in backends.items() if backend != NAME]
    if others:
        raise ValueError(
            f"torch {torch.__version__} would drop {', '.join(others)} beside {NAME}: make a group for each,"
            f' as with init_process_group("{NAME}") and new_group(backend="nccl")'
        )
