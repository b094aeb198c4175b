"""Tensors that the ranks of a machine read and write in place, so that collectives on them copy nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import pycomm
from pycomm.torch.collectives import communicator_of


def empty(*size: Any, dtype: Any = None, group: Any = None) -> Any:
    """Collective: returns a CPU tensor in symmetric memory, as comm.empty does an array.

    What `torch.distributed._symmetric_memory` does in two calls, empty() and rendezvous(), this does in one.

    size: numbers, or one sequence of them, as torch.empty takes them; every rank asks for as many bytes.
    dtype: torch's default dtype if None. group: the default process group if None. The elements are 0. The
    group's collectives use the tensor and its views in place; in a call all ranks pass views at the same
    place of it, or get a MismatchError. Other groups take it as they take other tensors. The memory is freed
    when every rank has dropped its tensor.

    It takes some milliseconds, more for larger ones: keep the tensor.

    Raises TypeError if `group` is not pycomm's, ValueError if ranks ask for different sizes, MemoryError if
    there is not enough memory.
    """
    shape = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    if isinstance(shape, str) or any(int(length) != length or length < 0 for length in shape):
        raise ValueError(f"`size` is {shape!r}: pass numbers of elements, 0 or more")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"`dtype` is {dtype!r}: pass one of torch's, such as torch.float32")
    comm = communicator_of(dist.group.WORLD if group is None else group)
    return _as_tensor(comm.empty(_bytes(shape, dtype), "uint8"), shape, dtype)


class _Allocator:
    def allocate(self, size: Sequence[int], *, dtype: Any, device: Any) -> Any:
        """For torch: a CPU tensor in a shared array, if it is of 64 KiB or more."""
        if torch.device(device).type != "cpu":
            raise ValueError(f"{type(self).__name__} allocates memory of the CPU, not of {device}")
        with pycomm.shared_arrays():
            array = np.empty(_bytes(size, dtype), np.uint8)
        return _as_tensor(array, size, dtype)


class SymmMemAllGather(_Allocator):
    """For set_custom_all_gather of an FSDP2 module: parameters are gathered in memory that all ranks use in
    place.

    It does for a pycomm group what torch's class of this name does for NCCL. FSDP2 allocates buffers for each
    call and drops them again, which symmetric memory is too slow for: these are shared arrays
    (docs/shared-arrays.md), which a rank makes alone. Their memory is used again.

    Raises TypeError, at the first call, if the module's group is not pycomm's.
    """

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> Any:
        communicator_of(group)
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class SymmMemReduceScatter(_Allocator):
    """For set_custom_reduce_scatter of an FSDP2 module: as SymmMemAllGather, of gradients."""

    def __call__(
        self, output_tensor: Any, input_tensor: Any, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        communicator_of(group)
        return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def _bytes(size: Sequence[int], dtype: Any) -> int:
    return math.prod(int(length) for length in size) * int(dtype.itemsize)


def _as_tensor(array: Any, size: Sequence[int], dtype: Any) -> Any:
    return torch.from_numpy(array).view(dtype).reshape(tuple(size))
