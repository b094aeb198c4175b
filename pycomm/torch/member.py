"""How a rank joins a process group and leaves it, however torch takes a backend that is written in Python
(pycomm.torch.backend, pycomm.torch.process_group)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore

import pycomm
from pycomm.autoload import NAME
from pycomm.torch.collectives import Collectives


# Kept alive until they leave. What torch puts around a group with TORCH_DISTRIBUTED_DEBUG=DETAIL keeps its own half
# of the object alone.
_members: set[Member] = set()


class Member(Collectives):
    """One rank of a process group whose ranks meet at `store`."""

    def __init__(self, comm: pycomm.Communicator, store: Any, timeout: timedelta) -> None:
        super().__init__(comm, timeout)
        self._store = store
        _members.add(self)

    @classmethod
    def join(cls, store: Any, rank: int, size: int, timeout: timedelta) -> Member:
        # A store may outlive a group, and the next group of that name would find what the last one left there.
        turn = store.add(f"pycomm/{rank}", 1)
        comm = pycomm.init(
            store=PrefixStore(f"pycomm/{turn}", store), rank=rank, size=size, timeout=timeout.total_seconds()
        )
        return cls(comm, store, timeout)

    def getBackendName(self) -> str:
        return NAME

    def shutdown(self) -> None:
        _members.discard(self)
        self.close()

    def abort(self) -> None:
        """For the other ranks: what they wait for will not come."""
        _members.discard(self)
        self._comm.leave("the process group was aborted")
