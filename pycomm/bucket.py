"""Many tensors in one buffer: packed in one pass, communicated in one call, unpacked in one pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from pycomm import _native, checks, layouts
from pycomm.gradients import Gradients, is_tensor
from pycomm.group import Communicator
from pycomm.stats import Stats

ID_BITS = 24
_LINE = 64  # bytes of a cache line, where storage starts


class Segment(NamedTuple):
    """A tensor's place in its bucket, elements [begin, end), and the id that its random bits depend on."""

    begin: int
    end: int
    id: int


class Bucket:
    """A buffer that holds several tensors; `comm.all_reduce(bucket)` reduces all of them.

    `tensors`: arrays or tensors of float32, float16, bfloat16 or float8, contiguous, of any shapes. A torch
    parameter stands for its gradient: pack() and unpack() copy its current `.grad`, which zero_grad() and
    backward() replace in every step. Pass x.detach() for a parameter's own values.

    `dtype`: the buffer's element type; by default that of the tensors, if they share one. `comm`: puts the
    buffer into that group's symmetric memory, so that packing is the copy into the window (a collective call:
    ValueError, on all ranks, if one makes another bucket). `names`: names of the tensors, by which error
    feedback keeps its residuals; "0", "1", ... by default. `missing_as_zero`: gives a parameter whose `.grad`
    is None a gradient of zeros, instead of raising ValueError; the optimizer, which skips parameters without
    a gradient, then sees that one.

    Every tensor starts at a multiple of 256 elements; the gaps are zero. The buckets of all ranks in a call
    must have the same names and shapes in the same order: MismatchError otherwise.
    """

    def __init__(
        self,
        tensors: Iterable[Any],
        dtype: Any = None,
        comm: Communicator | None = None,
        names: Iterable[str] | None = None,
        missing_as_zero: bool = False,
    ) -> None:
        if isinstance(dtype, _native.Communicator):
            raise TypeError("`dtype` is a Communicator: name it, as in Bucket(tensors, comm=comm)")
        if comm is not None and not isinstance(comm, _native.Communicator):
            raise TypeError(f"`comm` is a {type(comm).__name__}: pass a pycomm.Communicator")
        found = _tensors(tensors)
        self._memory = _memory_of(found, comm)
        described = [self._described(x, i) for i, x in enumerate(found)]
        self._named = names is not None
        self._names = checked_names(names, len(found))
        self._missing_as_zero = bool(missing_as_zero)
        self._gradients = self._gradients_of(found)
        if dtype is None:
            dtype = _common_dtype([x.dtype for x in described])
        self._dtype, self._itemsize = _native.packable_dtype(dtype)
        self._shapes = [x.shape for x in described]
        self._counts = [x.count for x in described]
        self._offsets, total = _layout(self._counts)
        ends = [offset + count for offset, count in zip(self._offsets, self._counts, strict=True)]
        self._segments = [
            Segment(*place) for place in zip(self._offsets, ends, segment_ids(self._names), strict=True)
        ]
        self._signature = f"bucket {layouts.signature(self._names, self._shapes)}"
        if comm is not None:
            _require_agreement(comm, self._dtype, self._names, self._shapes)
        self._storage = self._memory.allocate(total * self._itemsize, comm)
        of_torch = [is_tensor(x) for x in found]
        self._data = self._part(0, total, bool(of_torch) and all(of_torch))
        self._packing = self._memory.packing(self._data, self._offsets, self._counts)
        self._views = [
            self._part(segment.begin, segment.end, tensor).reshape(shape)
            for segment, tensor, shape in zip(self._segments, of_torch, self._shapes, strict=True)
        ]

    @property
    def data(self) -> Any:
        """The whole buffer, 1-D: a torch tensor if all of `tensors` are, else an array."""
        return self._data

    @property
    def __pycomm_buffer__(self) -> Any:
        return self._data

    @property
    def __pycomm_signature__(self) -> str:
        """Names and shapes, which ranks compare in a call besides the buffer (pycomm.layouts)."""
        return self._signature

    def __pycomm_mismatch__(self, text: str) -> str:
        """A MismatchError's text, with the first tensor in which the ranks differ."""
        return text + layouts.first_difference(text, self._names, self._shapes)

    @property
    def segments(self) -> Sequence[Segment]:
        """The places of the tensors.

        An id is the first 24 bits of the name's BLAKE2b hash, or the next free number if an earlier name in
        this bucket has it. So random bits depend on a tensor's name and not, except in collisions, on the
        other tensors of its bucket.
        """
        return tuple(self._segments)

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._names)

    @property
    def named(self) -> bool:
        """Whether names were given, which distinguish these parameters from those of other buckets."""
        return self._named

    @property
    def views(self) -> Sequence[Any]:
        """The places of the tensors in the buffer, in their shapes: as torch tensors where they are, else as
        arrays.

        After `bucket.tensors = bucket.views`, pack and unpack copy nothing. In a bucket of parameters, set
        the `.grad` of each to its view instead.
        """
        return tuple(self._views)

    @property
    def tensors(self) -> Sequence[Any]:
        """The tensors or parameters that were given. May be set to others of the same shapes."""
        return tuple(self._gradients.given)

    @tensors.setter
    def tensors(self, tensors: Iterable[Any]) -> None:
        found = _tensors(tensors)
        if len(found) != len(self._counts):
            raise ValueError(f"`tensors` has {len(found)} tensors where the bucket has {len(self._counts)}")
        for i, (x, shape) in enumerate(zip(found, self._shapes, strict=True)):
            has = self._described(x, i).shape
            if has != shape:
                raise ValueError(f"`tensors[{i}]` has shape {has} where the bucket has {shape}")
        self._gradients = self._gradients_of(found)

    def pack(self, scale: float = 1.0) -> Stats:
        """Copies the tensors to the buffer, each value times `scale`, cast to the buffer's type.

        Returns Stats of the written values: sum_squares, norm, max_abs, nans, infs, finite. Raises ValueError
        for a parameter without a gradient, and for a gradient that its parameter has dropped.
        """
        factor = checks.number(scale, "scale")
        return self._packing.pack(self._gradients.now(), factor)

    def unpack(self, scale: float = 1.0) -> Stats:
        """Copies the buffer to the tensors, each value times `scale`, cast to their types.

        Returns Stats of the written values: the same on all ranks after an all_reduce.
        """
        factor = checks.number(scale, "scale")
        return self._packing.unpack(self._gradients.now(), factor)

    def check_unpack(self) -> None:
        """Raises what unpack() would, for example for a tensor that is read-only or overlaps another."""
        self._packing.check_unpack(self._gradients.now())

    def __reduce__(self) -> Any:
        raise TypeError("a Bucket is memory that its tensors share and cannot be copied: make another one")

    def __len__(self) -> int:
        return len(self._counts)

    def __repr__(self) -> str:
        return f"<pycomm.Bucket of {len(self)} tensors, {sum(self._counts)} elements of {self._dtype}>"

    def _described(self, x: Any, i: int) -> _native.Array:
        """A tensor that can be packed. Raises TypeError or ValueError for others."""
        found = _native.describe_buffer(x, f"tensors[{i}]", self._memory.on_gpu)
        _native.packable_dtype(found.dtype, f"tensors[{i}]")
        return found

    def _gradients_of(self, tensors: list[Any]) -> Gradients:
        return Gradients(tensors, self._names if self._named else None, self._missing_as_zero)

    def _part(self, begin: int, end: int, as_tensor: bool) -> Any:
        raw = self._storage[begin * self._itemsize : end * self._itemsize]
        return self._memory.typed(raw, self._dtype, as_tensor)


class Memory(Protocol):
    """The memory that tensors and their bucket lie in."""

    on_gpu: bool

    def allocate(self, size: int, comm: Communicator | None) -> Any:
        """Zeroed bytes, from the start of a cache line on."""

    def typed(self, raw: Any, dtype: str, as_tensor: bool) -> Any:
        """The bytes `raw` as elements."""

    def packing(self, data: Any, offsets: list[int], counts: list[int]) -> Packing:
        """The places of tensors in `data`; pack and unpack get the tensors."""


class Packing(Protocol):
    """Copies tensors to their places and back; each call passes the tensors."""

    def pack(self, tensors: list[Any], scale: float) -> Stats: ...

    def unpack(self, tensors: list[Any], scale: float) -> Stats: ...

    def check_unpack(self, tensors: list[Any]) -> None: ...


class _Host:
    on_gpu = False

    def allocate(self, size: int, comm: Communicator | None) -> npt.NDArray[np.uint8]:
        if comm is not None:
            array: npt.NDArray[np.uint8] = comm.empty(size, "uint8")
            return array
        memory = np.zeros(size + _LINE, np.uint8)
        start = -memory.ctypes.data % _LINE
        return memory[start : start + size]

    def typed(self, raw: Any, dtype: str, as_tensor: bool) -> Any:
        if not as_tensor:
            return raw.view(_native.numpy_dtype(dtype))
        import torch

        return torch.from_numpy(raw).view(getattr(torch, dtype))

    def packing(self, data: Any, offsets: list[int], counts: list[int]) -> Packing:
        return _HostPacking(_native.Packing(data, offsets, counts))


class _HostPacking:
    def __init__(self, native: _native.Packing) -> None:
        self._native = native

    def pack(self, tensors: list[Any], scale: float) -> Stats:
        return Stats(*self._native.pack(tensors, scale))

    def unpack(self, tensors: list[Any], scale: float) -> Stats:
        return Stats(*self._native.unpack(tensors, scale))

    def check_unpack(self, tensors: list[Any]) -> None:
        self._native.check_unpack(tensors)


def _memory_of(tensors: list[Any], comm: Communicator | None) -> Memory:
    on_gpu = [bool(getattr(x, "is_cuda", False)) or hasattr(x, "__cuda_array_interface__") for x in tensors]
    if not any(on_gpu):
        return _Host()
    if not all(on_gpu):
        raise TypeError(
            f"`tensors[{on_gpu.index(False)}]` is not on a GPU, but others are: put all on one side"
        )
    if comm is not None:
        raise ValueError("`comm` is given for tensors on a GPU: symmetric memory is on the CPU only")
    from pycomm.cuda.bucket import Gpu

    return Gpu(tensors[0])


def _require_agreement(
    comm: Communicator, dtype: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> None:
    """Collective: raises the same error on all ranks if one makes another bucket."""
    tensors = [f"{name!r} of shape {shape}" for name, shape in zip(names, shapes, strict=True)]
    mine = [f"a buffer of {dtype}", *tensors]
    digests = comm.all_gather_object(hashlib.blake2b(repr(mine).encode()).hexdigest())
    rank = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if rank is None:
        return
    everyones = cast(list[list[str]], comm.all_gather_object(mine))
    pairs = zip_longest(everyones[0], everyones[rank], fillvalue="no tensor")
    i, (here, there) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    what = f"`tensors[{i - 1}]`" if i else "the bucket"
    raise ValueError(
        f"{what} is {here} on rank 0 and {there} on rank {rank}: make the bucket of the same tensors, in the"
        " same order, on all ranks of `comm`"
    )


def segment_ids(names: Sequence[str]) -> list[int]:
    taken: dict[int, None] = {}
    for name in names:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "big") >> (64 - ID_BITS)
        while number in taken:
            number = (number + 1) % (1 << ID_BITS)
        taken[number] = None
    return list(taken)


def checked_names(names: Iterable[str] | None, count: int) -> list[str]:
    if names is None:
        return [str(i) for i in range(count)]
    if isinstance(names, str):
        raise TypeError(f"`names` is {names!r}: pass a list of strings, one for each tensor")
    found = listed(names, "names", "strings")
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"`names` holds {name!r}: names are strings")
        if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
            raise ValueError(f"`names` holds {name!r}, half of a surrogate pair: names are text")
    if len(found) != count:
        raise ValueError(f"`names` has {len(found)} names for {count} tensors")
    if len(set(found)) != count:
        seen: set[str] = set()
        twice = next(name for name in found if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"`names` holds {twice!r} twice: each tensor needs its own name")
    return found


def separate(given: Iterable[Any], name: str) -> list[Any]:
    """A list of what is meant as several tensors. Raises TypeError for one tensor, and for named ones."""
    if hasattr(given, "shape"):
        raise TypeError(f"`{name}` is one array or tensor: pass a list of them")
    if isinstance(given, Mapping):
        raise TypeError(f"`{name}` is a mapping: pass its values, and its keys as names=")
    found = listed(given, name, name)
    if any(isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str) for x in found):
        raise TypeError(f"`{name}` holds names and tensors: pass the tensors, and the names as names=")
    return found


def refuse_twice(given: Sequence[Any], names: Sequence[str]) -> None:
    """Raises ValueError for a gradient that is given twice."""
    first: dict[int, str] = {}
    for x, name in zip(given, names, strict=True):
        if hasattr(x, "shape") and first.setdefault(id(x), name) != name:
            raise ValueError(f"gradients {first[id(x)]!r} and {name!r} are the same: pass each one once")


def _tensors(given: Iterable[Any]) -> list[Any]:
    found = separate(given, "tensors")
    for i, x in enumerate(found):
        checks.buffer(x, f"tensors[{i}]")
    return found


def listed(values: Iterable[Any], name: str, of: str) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise TypeError(f"`{name}` is a {type(values).__name__}: pass a list of {of}") from None


def _common_dtype(of_tensors: list[str]) -> str:
    kinds = list(dict.fromkeys(of_tensors))
    if len(kinds) == 1:
        return kinds[0]
    if not kinds:
        raise ValueError("`tensors` is empty: give the bucket's type as dtype=")
    raise TypeError(f"`tensors` are {', '.join(kinds)}: give the bucket's type as dtype=")


def _layout(counts: list[int]) -> tuple[list[int], int]:
    align = _native.SEGMENT_ALIGN
    offsets, total = [], 0
    for count in counts:
        offsets.append(total)
        total += -(-count // align) * align
    return offsets, total
