"""How torch takes a backend that is written in Python, from 2.14 on: as the backend of one device.

The group is torch's own. It has a backend for each device ("cpu:pycomm,cuda:nccl"), and calls this one with
the tensors of the CPU. Of a call's handle, it passes on `wait` and `get_future` alone.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Backend as _TorchBackend

import pycomm
from pycomm.autoload import NAME
from pycomm.torch.member import Member
from pycomm.torch.uncompiled import uncompiled
from pycomm.torch.work import Handle


@uncompiled
class Backend(Member, _TorchBackend):  # type: ignore[misc]  # torch is not typed here
    # All that torch asks for: it calls itself, until the stack is full, for one that is not answered here.
    supports_splitting = True
    supports_coalescing = False
    supports_time_estimate = False
    supports_shrinking = False
    supports_reconfigure = False
    supports_window = False

    def __init__(self, comm: pycomm.Communicator, store: Any, timeout: timedelta) -> None:
        _TorchBackend.__init__(self, comm.rank, comm.size)
        Member.__init__(self, comm, store, timeout)
        self._count = 0
        self._parts: list[Member] = []  # of split_group, which torch tells of no end

    @property
    def options(self) -> Any:
        return _TorchBackend.Options(NAME, timedelta(seconds=self._seconds or 0))

    def split(self, store: Any, ranks: list[int], opts: Any) -> Member:
        """The backend of the group of `ranks`, which meet at `store`: for split_group of this group."""
        if self._comm.rank not in ranks:  # torch would follow a null pointer
            raise ValueError(
                f"rank {self._comm.rank} is in none of the groups that split_group makes: give it one, or use"
                " new_group"
            )
        part = self.join(store, ranks.index(self._comm.rank), len(ranks), opts._timeout)
        self._parts.append(part)
        return part

    def shutdown(self) -> None:
        for part in self._parts:
            part.shutdown()
        super().shutdown()

    def monitored_barrier(self, opts: Any, wait_all_ranks: bool = False) -> None:
        if wait_all_ranks:
            raise ValueError("wait_all_ranks=True: pycomm names one late rank; pass False")
        self.barrier(opts).wait()

    def allreduce(self, tensors: list[Any], opts: Any = None) -> Handle | None:
        count = self._count + 1
        handle = super().allreduce(tensors, opts)
        self._count = count  # by one, whether it took the short way or _run
        return handle

    def _run(self, *args: Any) -> Handle:
        self._count += 1
        return super()._run(*args)

    def _get_sequence_number_for_group(self) -> int:
        """How many collectives there were: TORCH_DISTRIBUTED_DEBUG=DETAIL compares it among ranks."""
        return self._count
