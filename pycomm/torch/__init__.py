"""pycomm as a backend of torch.distributed: importing this registers it. Where pycomm is installed, `import
torch` has done so (pycomm.autoload).

import pycomm.torch
torch.distributed.init_process_group("pycomm")  # or "cpu:pycomm"

It takes CPU tensors, of ranks on one machine. What torch builds on a process group then runs on pycomm: DDP,
FSDP2, DeviceMesh and the others. empty() and the classes beside it make tensors that the ranks use in place;
compress() lets gradients cross compressed.
"""

import torch.distributed

if not torch.distributed.is_available():
    raise ImportError("this build of torch has no torch.distributed, which pycomm.torch is a backend of")

from torch._C._distributed_c10d import Backend as _TorchBackend

from pycomm import autoload
from pycomm.torch.compress import compress
from pycomm.torch.member import Member
from pycomm.torch.symmetric import SymmMemAllGather, SymmMemReduceScatter, empty

backend_class: type[Member]
try:
    _TorchBackend(0, 1)
except TypeError:  # torch before 2.14: C++ alone can derive from it
    from pycomm.torch.process_group import ProcessGroup

    backend_class = ProcessGroup
else:
    from pycomm.torch.backend import Backend

    backend_class = Backend

__all__ = ["SymmMemAllGather", "SymmMemReduceScatter", "compress", "empty"]

autoload.register()
