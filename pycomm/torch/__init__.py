"""pycomm as a backend of torch.distributed: importing this registers it.

import pycomm.torch
torch.distributed.init_process_group("pycomm")  # or "cpu:pycomm"

It takes CPU tensors, of ranks on one machine. What torch builds on a process group then runs on pycomm: DDP,
FSDP2, DeviceMesh and the others.
"""

import torch.distributed

if not torch.distributed.is_available():
    raise ImportError("this build of torch has no torch.distributed, which pycomm.torch is a backend of")

from pycomm.torch import process_group

__all__: list[str] = []

process_group.register()
