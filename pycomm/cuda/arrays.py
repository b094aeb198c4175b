"""Arrays on a GPU as the kernels need them, the streams that calls go to, and whether there is a GPU."""

from __future__ import annotations

import functools
import importlib
import math
import sys
from dataclasses import dataclass
from typing import Any


def is_available() -> bool:
    """Whether the kernels were built and a device is there."""
    try:
        native()
    except RuntimeError:
        return False
    return True


@functools.lru_cache(maxsize=1)
def native() -> Any:
    """The extension module. Raises RuntimeError that says what is missing."""
    try:
        module: Any = importlib.import_module("pycomm._cuda")
    except ImportError as error:
        if error.name != "pycomm._cuda":
            raise
        raise RuntimeError(
            "pycomm was built without CUDA kernels: with the CUDA toolkit (12.4 or newer, nvcc on the PATH) "
            "`pip install -C cmake.define.PYCOMM_CUDA=ON .` in pycomm's sources builds them, or says what is "
            "missing"
        ) from None
    devices, reason = module.device_count()
    if devices == 0:
        built, driver = module.versions()
        found = f"the driver has CUDA {_version(driver)}" if driver else "there is no NVIDIA driver"
        raise RuntimeError(
            f"no CUDA device: {reason or 'none is visible'} (built with CUDA {_version(built)}, {found}): "
            f"install a driver for CUDA {built // 1000} or newer, and look at CUDA_VISIBLE_DEVICES"
        )
    return module


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@dataclass(frozen=True)
class Array:
    """What a kernel needs to know of an argument."""

    address: int
    dtype: str
    count: int
    device: int
    writable: bool = True


_CPU, _CUDA, _MANAGED = 1, 2, 13  # DLPack's device types


def describe(x: Any, name: str = "x") -> Array:
    """Address, type, elements and device of an array. Raises TypeError or ValueError that says what to do."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        if x.device.type != "cuda":
            raise TypeError(f"`{name}` is on {x.device}: pass a tensor on a CUDA device, x.cuda()")
        return _from_torch(x, name)
    interface = getattr(x, "__cuda_array_interface__", None)
    if interface is not None:
        return _from_interface(x, interface, name)
    if hasattr(x, "__dlpack__"):
        return _from_dlpack(x, name)
    raise TypeError(
        f"`{name}` is a {type(x).__name__}: pass a CuPy array, a torch tensor on a CUDA device, or anything "
        "with __cuda_array_interface__ or DLPack"
    )


def _from_torch(x: Any, name: str) -> Array:
    if str(x.layout) != "torch.strided":
        raise TypeError(f"`{name}` is not a dense tensor ({x.layout}): pass x.to_dense()")
    for deferred, remedy in (("is_conj", "resolve_conj"), ("is_neg", "resolve_neg")):
        if getattr(x, deferred)():
            raise ValueError(f"`{name}` has not been computed yet ({deferred}()): pass x.{remedy}()")
    if not x.is_contiguous():
        raise ValueError(f"`{name}` is not contiguous: pass x.contiguous() and copy the result back")
    found = Array(x.data_ptr(), str(x.dtype).removeprefix("torch."), x.numel(), x.device.index)
    _require_memory(found, name)
    return found


def _require_memory(found: Array, name: str) -> None:
    if found.count > 0 and found.address == 0:
        raise TypeError(f"`{name}` has no memory behind its elements: pass a plain array or tensor")


def _from_interface(x: Any, interface: dict[str, Any], name: str) -> Array:
    import numpy as np

    if interface.get("mask") is not None:
        raise ValueError(f"`{name}` has a mask, which would be ignored: pass an array without")
    dtype = getattr(x, "dtype", None)
    by_letters = np.dtype(interface["typestr"])
    try:  # the interface's type strings have no name for bfloat16 and float8: the object's own dtype does
        described = np.dtype(dtype if dtype is not None else by_letters)
    except TypeError:
        described = by_letters
    if described.itemsize != by_letters.itemsize:
        raise TypeError(f"`{name}` has dtype {described}, and its interface says {by_letters}: pass a copy")
    if not by_letters.isnative:
        raise ValueError(f"`{name}` is byte-swapped: pass a copy in this machine's order")
    address, read_only = interface["data"]
    shape, strides = interface["shape"], interface.get("strides")
    if any(extent < 0 for extent in shape):
        raise ValueError(f"`{name}` has shape {tuple(shape)}: extents are 0 or more")
    count = math.prod(shape)
    expected = described.itemsize
    for extent, stride in zip(reversed(shape), reversed(strides or ()), strict=bool(strides)):
        if count > 0 and extent != 1 and stride != expected:
            raise ValueError(
                f"`{name}` is not contiguous in C order: pass a contiguous copy, copy the result back"
            )
        expected *= extent
    device = getattr(getattr(x, "device", None), "id", None)  # CuPy's
    if not isinstance(device, int):
        device = native().device_of(address) if address else 0
    found = Array(address or 0, described.name, count, device, not read_only and not _is_of_jax(x))
    _require_memory(found, name)
    return found


def _from_dlpack(x: Any, name: str) -> Array:
    kind, device = x.__dlpack_device__()
    if kind not in (_CUDA, _MANAGED):
        where = "in CPU memory" if kind == _CPU else f"on a device of another kind (DLPack's {int(kind)})"
        raise TypeError(
            f"`{name}` is {where}: pycomm.cuda takes arrays and tensors on an NVIDIA GPU, move it there"
        )
    address, dtype, count, contiguous, writable = native().read_dlpack(x, name)
    if not contiguous:
        raise ValueError(
            f"`{name}` is not contiguous in C order: pass a contiguous copy, copy the result back"
        )
    return Array(address, dtype, count, device, writable and not _is_of_jax(x))


def _is_of_jax(x: Any) -> bool:
    """Whether `x` is immutable, which neither protocol says of JAX's arrays."""
    return type(x).__module__.partition(".")[0] in ("jax", "jaxlib")


def stream_handle(stream: Any, like: Any, device: int) -> int:
    """A stream's handle: of `stream`, or the current one of the library that `like` is of."""
    if stream is None:
        torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
        if torch is not None and isinstance(like, torch.Tensor):
            return int(torch.cuda.current_stream(device).cuda_stream)
        if cupy is not None and isinstance(like, cupy.ndarray):
            return int(cupy.cuda.get_current_stream(device).ptr)
        return 0  # the legacy default stream, which waits for all that block it and is waited for by them
    if isinstance(stream, int):
        return stream
    for attribute in ("cuda_stream", "ptr"):
        handle = getattr(stream, attribute, None)
        if handle is not None:
            return int(handle)
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    raise TypeError(f"`stream` is a {type(stream).__name__}: pass a stream of torch or CuPy, or a handle")


def new_bytes(size: int, like: Any, device: int, stream: int) -> Any:
    """Device memory that lives in the order of `stream`, from the library that `like` is of."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(like, torch.Tensor):
        if stream == torch.cuda.current_stream(device).cuda_stream:
            return torch.empty(size, dtype=torch.uint8, device=like.device)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=like.device)):
            return torch.empty(size, dtype=torch.uint8, device=like.device)
    if cupy is not None:
        with cupy.cuda.Device(device):
            if stream in (0, 1, 2):
                return cupy.empty(size, cupy.uint8)
            with cupy.cuda.ExternalStream(stream, device):
                return cupy.empty(size, cupy.uint8)
    raise TypeError(
        f"memory for the result is needed, and {type(like).__name__} is of neither torch nor CuPy: pass it "
        "yourself (out=, workspace=)"
    )


class Call:
    """The arguments of one call: all on one device, and where it runs."""

    def __init__(self, stream: Any, blocks: int, **arrays: Any) -> None:
        self.module = native()
        self.found: dict[str, list[Array]] = {}
        self.device: int | None = None
        for name, value in arrays.items():
            values = value if isinstance(value, list) else [] if value is None else [value]
            self.found[name] = [self._enter(x, name) for x in values]
        self.like = next(v[0] if isinstance(v, list) else v for v in arrays.values() if v is not None)
        self.stream = stream_handle(stream, self.like, self.device or 0)
        self.where = self.module.Where(self.device or 0, self.stream, blocks)

    def writes(self, *names: str) -> None:
        """Refuses what the call could not, or must not, write to."""
        for name in names:
            for x in self.found[name]:
                require_writable(x, name)

    def _enter(self, x: Any, name: str) -> Array:
        found = describe(x, name)
        if self.device is None:
            self.device = found.device
        elif found.device != self.device:
            raise ValueError(
                f"`{name}` is on device {found.device}, and others are on {self.device}: move it"
            )
        return found

    def one(self, name: str) -> Array:
        return self.found[name][0]

    def address(self, name: str) -> int:
        return self.found[name][0].address if self.found[name] else 0

    def new_bytes(self, size: int) -> Any:
        return new_bytes(size, self.like, self.device or 0, self.stream)


def require_writable(x: Array, name: str) -> None:
    if not x.writable:
        raise ValueError(f"`{name}` is read-only and the result would be written to it: pass a writable copy")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
