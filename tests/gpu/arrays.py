"""Arrays of every type on CPU and GPU. Tests compare bits, so arrays are transferred as bytes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

FLOATS = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
DTYPES = (
    *FLOATS,
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
    "complex64",
    "complex128",
)


def numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def values(dtype: str, count: int, seed: int, any_bits: bool = False) -> np.ndarray[Any, Any]:
    """Moderate numbers, or any bits: NaN with payloads, Inf and subnormal ones among them."""
    rng = np.random.default_rng(seed)
    kind = numpy_dtype(dtype)
    if dtype == "bool":
        return rng.integers(0, 2, count).astype(bool)
    if any_bits or kind.kind in "iu":
        return np.frombuffer(rng.bytes(count * kind.itemsize), np.uint8).view(kind)
    numbers = rng.standard_normal(count) * np.exp2(rng.integers(-6, 4, count))
    if kind.kind == "c":
        numbers = numbers + 1j * rng.standard_normal(count)
    return numbers.astype(kind)


def to_gpu(x: np.ndarray[Any, Any], misplaced: int = 0) -> Any:
    """A tensor with the same bytes, `misplaced` bytes after a multiple of 256."""
    memory = torch.full((misplaced + x.nbytes + 64,), 0xA5, dtype=torch.uint8, device="cuda")
    part = memory[misplaced : misplaced + x.nbytes]
    part.copy_(torch.from_numpy(np.ascontiguousarray(x).view(np.uint8).copy()))
    return part.view(getattr(torch, str(x.dtype))) if misplaced % x.itemsize == 0 else part


def to_cpu(x: Any) -> np.ndarray[Any, Any]:
    """The array's bytes."""
    return x.contiguous().view(torch.uint8).cpu().numpy()


def same(got: Any, want: np.ndarray[Any, Any], nan_is_nan: bool = False) -> bool:
    mine, theirs = to_cpu(got), want.view(np.uint8)
    if np.array_equal(mine, theirs):
        return True
    if not nan_is_nan:
        return False
    a, b = mine.view(want.dtype), want
    return bool(np.all((np.isnan(a) & np.isnan(b)) | (a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}"))))
