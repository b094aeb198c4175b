"""How a rank joins a process group and leaves it, in whichever way torch takes the backend
(pycomm.torch.backend, pycomm.torch.process_group).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore

import pycomm
from pycomm.autoload import NAME
from pycomm.torch.collectives import Collectives
from pycomm.torch.uncompiled import uncompiled
from pycomm.torch.work import seconds

# Kept alive until they leave: with TORCH_DISTRIBUTED_DEBUG=DETAIL torch keeps no more than its half of one.
_members: set[Member] = set()


@uncompiled
class Member(Collectives):
    """One rank of a process group whose ranks meet at `store`."""

    def __init__(self, comm: pycomm.Communicator, store: Any, timeout: timedelta) -> None:
        super().__init__(comm, timeout)
        self._store = store
        _members.add(self)

    @classmethod
    def join(cls, store: Any, rank: int, size: int, timeout: timedelta) -> Member:
        # A store may outlive a group; the next group of that name would find what the last one left there.
        turn = store.add(f"pycomm/{rank}", 1)
        comm = pycomm.init(
            store=PrefixStore(f"pycomm/{turn}", store), rank=rank, size=size, timeout=seconds(timeout)
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
