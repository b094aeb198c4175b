"""The arguments of a call on a GPU, the streams that calls go to, and whether there is a GPU."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from pycomm import _native


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


def describe(x: Any, name: str = "x") -> _native.Array:
    """What an array on a GPU holds. Raises TypeError or ValueError that says what to do."""
    return _native.describe_buffer(x, name, on_gpu=True)


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
    """The arguments of one call, each read once: all on one device, and where it runs."""

    def __init__(self, stream: Any, blocks: int, **arrays: Any) -> None:
        self.module = native()
        self.found: dict[str, list[_native.Array]] = {}
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
                x.require_writable(name)

    def _enter(self, x: Any, name: str) -> _native.Array:
        found = describe(x, name)
        if self.device is None:
            self.device = found.device
        elif found.device != self.device:
            raise ValueError(
                f"`{name}` is on device {found.device}, and others are on {self.device}: move it"
            )
        return found

    def one(self, name: str) -> _native.Array:
        return self.found[name][0]

    def address(self, name: str) -> int:
        return self.found[name][0].address if self.found[name] else 0

    def make(self, name: str, size: int) -> Any:
        """New bytes for an argument that was not given."""
        memory = new_bytes(size, self.like, self.device or 0, self.stream)
        self.found[name] = [self._enter(memory, name)]
        return memory


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
