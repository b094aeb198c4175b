"""What DLPack exporters may export, and what is refused: every field is made up, in many examples.

PYCOMM_FUZZ_ROUNDS: how many capsules are made, 20,000 by default.
"""

import ctypes
import math
import os
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pycomm
from pycomm import Communicator, _native

ROUNDS = int(os.environ.get("PYCOMM_FUZZ_ROUNDS", "20000"))
BYTES = 512  # of memory behind the made-up tensors


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Exporter:
    """An object that exports a tensor with these fields, and keeps them alive."""

    def __init__(self, name: bytes = b"dltensor_versioned", major: int = 1, flags: int = 0, **fields: Any):
        self.name = name
        versioned = name == b"dltensor_versioned"
        self.managed = Versioned(major, 3, None, None, flags) if versioned else Managed()
        tensor = self.managed.tensor
        self.kept = []
        for field, value in fields.items():
            if isinstance(value, list):
                held = (ctypes.c_int64 * max(len(value), 1))(*value)
                self.kept.append(held)
                value = ctypes.addressof(held)
            setattr(tensor, field, value)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return new_capsule(ctypes.addressof(self.managed), self.name, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class OnDevice(Exporter):
    """The same where its fields say, and what it was asked for. Nothing of it is memory."""

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        tensor = self.managed.tensor
        self.device: Any = tensor.device_type, tensor.device_id
        self.asked: list[dict[str, Any]] = []

    def __dlpack__(self, **kwargs: Any) -> Any:
        self.asked.append(kwargs)
        return super().__dlpack__()

    def __dlpack_device__(self) -> Any:
        if isinstance(self.device, BaseException):
            raise self.device
        return self.device


CPU, CUDA, PINNED, METAL, MANAGED = 1, 2, 3, 8, 13  # DLPack's device types
FLOAT32 = {"device_type": 1, "code": 2, "bits": 32, "lanes": 1}


def exporter(x: Any, **changes: Any) -> Exporter:
    """An exporter of a float32 array, with `changes` to its fields."""
    fields = {"data": x.ctypes.data, "ndim": x.ndim, "shape": list(x.shape), "strides": None, **FLOAT32}
    return Exporter(**{**fields, **changes})


def on_device(kind: int = CUDA, number: int = 1, made: type[OnDevice] = OnDevice, **changes: Any) -> Any:
    """(3, 4) elements of float32 on a device, but for `changes`."""
    fields = {**FLOAT32, "device_type": kind, "device_id": number, "data": 4096, "ndim": 2, "shape": [3, 4]}
    return made(**{**fields, **changes})


# The known types, by the letters of the array interface if it has them.
KNOWN = {
    (kind, 8 * size): name
    for kind, names in {
        0: ["int8", "int16", "int32", "int64"],
        1: ["uint8", "uint16", "uint32", "uint64"],
        2: ["float16", "float32", "float64"],
        5: ["complex64", "complex128"],
        6: ["bool"],
    }.items()
    for name in names
    for size in [np.dtype(name).itemsize]
} | {(4, 16): "bfloat16", (10, 8): "float8_e4m3fn", (12, 8): "float8_e5m2"}


def expected(name: bytes, major: int, shape: Any, strides: Any, fields: dict[str, Any], on_gpu: bool) -> Any:
    """The type and shape that must be recognised in such a tensor, or None if it must be refused."""
    dtype = KNOWN.get((fields["code"], fields["bits"]))
    if name not in (b"dltensor", b"dltensor_versioned") or (name == b"dltensor_versioned" and major != 1):
        return None
    if dtype is None or fields["lanes"] != 1:
        return None
    if fields["device_type"] not in ((CUDA, MANAGED) if on_gpu else (CPU,)):
        return None
    if on_gpu and fields["device_id"] < 0:
        return None
    if not 0 <= fields["ndim"] <= 64 or (fields["ndim"] and shape is None):
        return None
    shape = (shape or [])[: fields["ndim"]]
    bytes_ = math.prod(extent or 1 for extent in shape) * fields["bits"] // 8
    if any(extent < 0 for extent in shape) or bytes_ >= 1 << 63:
        return None
    if 0 not in shape:
        if not fields["data"] or fields["data"] + fields["byte_offset"] + bytes_ >= 1 << 64:
            return None
        inner = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        if strides is not None and any(
            n != 1 and stride != want for n, stride, want in zip(shape, strides, inner, strict=False)
        ):
            return None
    return dtype, list(shape)


def made_up(random: random.Random, memory: int, on_gpu: bool) -> tuple[Exporter, Any, dict[str, Any]]:
    """A tensor with mostly plausible fields, and the expected type and shape."""

    def choose(usual: Any, *others: Any) -> Any:
        return usual if random.random() < 0.9 else random.choice(others)

    kind = random.choice(list(KNOWN))
    ndim = random.choice([0, 1, 1, 2, 3])
    extents = [0, 1, 2, 3, 5, -1, -(1 << 63), 1 << 31, 1 << 40, (1 << 63) - 1]
    weights = [2, 6, 6, 6, 6, 0.2, 0.1, 0.2, 0.3, 0.3]
    shape = choose(random.choices(extents, weights, k=ndim), None)
    inner = [math.prod((shape or [])[d + 1 :]) for d in range(ndim)]
    strides = choose(None, [random.randint(-2, 6) for _ in inner])
    if strides is None and all(abs(stride) < 1 << 63 for stride in inner):
        strides = choose(inner, None)
    fields = {
        "data": choose(memory, 0, 1, (1 << 64) - 8),
        "device_type": choose(CUDA if on_gpu else CPU, 0, 1, 2, 3, 13, -1, 1 << 30),
        "device_id": choose(0, 1, 7, -1, -(1 << 31)),
        "ndim": choose(ndim, -1, -(1 << 31), 65, (1 << 31) - 1),
        "code": choose(kind[0], random.randrange(20), random.randrange(256)),
        "bits": choose(kind[1], 0, 1, 4, 8, 16, 24, 32, 64, 80, 128, random.randrange(256)),
        "lanes": choose(1, 0, 2, 4, 65535),
        "byte_offset": choose(0, 1, 8, 13, 1 << 63, (1 << 64) - 1),
    }
    name = choose(random.choice([b"dltensor", b"dltensor_versioned"]), b"used_dltensor", b"", b"other")
    major = choose(1, 0, 2, (1 << 32) - 1)
    want = expected(name, major, shape, strides, fields, on_gpu)
    found = OnDevice(name, major, shape=shape, strides=strides, **fields)
    return found, want, fields


@pytest.mark.parametrize("on_gpu", [False, True])
def test_made_up_tensors_are_taken_for_what_they_are_or_refused(on_gpu: bool) -> None:
    chance = random.Random(5)
    memory = np.frombuffer(chance.randbytes(BYTES), np.uint8)
    taken = 0
    for _ in range(ROUNDS):
        x, want, fields = made_up(chance, memory.ctypes.data, on_gpu)
        try:
            found = _native.describe_buffer(x, "x", on_gpu)
        except (TypeError, ValueError) as error:
            assert want is None, (error, want, fields)
            assert "`x`" in str(error)
            continue
        assert (found.dtype, list(found.shape)) == want, (found.dtype, found.shape, want, fields)
        assert found.count == math.prod(want[1])
        assert found.device == (fields["device_id"] if on_gpu else -1)
        assert found.count == 0 or found.address == fields["data"] + fields["byte_offset"]
        taken += 1
        size = math.prod(want[1]) * fields["bits"] // 8
        begin = fields["byte_offset"]
        if not on_gpu and size and fields["data"] == memory.ctypes.data and begin + size <= BYTES:
            out = np.zeros(size, np.uint8)
            _native.copy_bytes(out, x)
            assert out.tobytes() == memory[begin : begin + size].tobytes()
    assert ROUNDS / 10 < taken < ROUNDS


def test_a_type_is_not_taken_for_its_neighbour() -> None:
    x = np.zeros(64, np.float32)
    for code in range(256):
        for bits in (0, 1, 4, 6, 8, 16, 24, 32, 64, 80, 96, 128, 255):
            for lanes in (0, 1, 2):
                tensor = exporter(x, code=code, bits=bits, lanes=lanes, shape=[4])
                if lanes == 1 and (code, bits) in KNOWN:
                    assert _native.describe_buffer(tensor, "x").dtype == KNOWN[code, bits]
                    continue
                with pytest.raises(TypeError, match=f"code {code}, {bits} bits, lanes {lanes}.*convert it"):
                    _native.describe_buffer(tensor, "x")


def test_marks_of_versioned_tensors() -> None:
    def fn(comm: Communicator) -> None:
        x = np.ones(4, np.float32)
        for flags, why in ((1, "read-only"), (2, "exports a copy"), (3, "read-only|copy")):
            marked = exporter(x, flags=flags)
            calls: list[Callable[[], Any]] = [
                lambda m=marked: comm.all_reduce(m),
                lambda m=marked: comm.all_reduce(x.copy(), out=m),
                lambda m=marked: comm.all_reduce([m]),
                lambda m=marked: comm.all_reduce_init(m),
                lambda m=marked: comm.all_reduce(m, async_op=True),
                lambda m=marked: comm.all_reduce(m, codec="int8"),
                lambda m=marked: comm.all_gather(x, out=m),
                lambda m=marked: comm.send_recv(x, 0, m, 0),
            ]
            for call in calls:
                with pytest.raises(ValueError, match=why):
                    call()
            assert comm.all_reduce(marked, out=np.zeros(4, np.float32)).tolist() == [1] * 4
        assert comm.all_reduce(exporter(x, flags=4)) is not None  # a flag without consequences

    pycomm.run_local(fn, 1)


def test_exports_that_are_none() -> None:
    class Exports:
        def __init__(self, what: Any) -> None:
            self.what = what

        def __dlpack__(self, **kwargs: Any) -> Any:
            if isinstance(self.what, BaseException):
                raise self.what
            return self.what

    x = np.ones(4, np.float32)
    used, newer = exporter(x, name=b"used_dltensor"), exporter(x, major=2)  # alive: capsules point to them
    for what, why in (
        (None, "returned a NoneType"),
        (7, "returned a int"),
        (x, "returned a numpy.ndarray"),
        (used.__dlpack__(), 'returned a capsule "used_dltensor"'),
        (newer.__dlpack__(), "returned a tensor of DLPack 2"),
        (BufferError("in use"), "raised BufferError: in use"),
        (RuntimeError("gone"), "raised RuntimeError: gone"),
    ):
        with pytest.raises(TypeError, match=f"`x` cannot be read: its __dlpack__\\(\\) {why}"):
            _native.describe_buffer(Exports(what), "x")
    with pytest.raises(KeyboardInterrupt):
        _native.describe_buffer(Exports(KeyboardInterrupt()), "x")


def test_exporters_from_before_versions() -> None:
    class Old(Exporter):
        def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
            return super().__dlpack__()

    x = np.ones(4, np.float32)
    old = Old(b"dltensor", data=x.ctypes.data, ndim=1, shape=[4], **FLOAT32)
    found = _native.describe_buffer(old, "x")
    assert (found.dtype, found.shape) == ("float32", (4,))
    found.require_writable("x")


def test_arrays_that_are_immutable_by_type() -> None:
    """JAX's capsules do not say that their arrays are."""
    jax = type("Array", (Exporter,), {"__module__": "jaxlib._jax"})
    x = np.ones(4, np.float32)
    array = jax(b"dltensor", data=x.ctypes.data, ndim=1, shape=[4], **FLOAT32)

    def fn(comm: Communicator) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: comm.all_reduce(array),
            lambda: comm.send_recv(x, 0, array, 0),
            lambda: comm.all_reduce([array]),
            lambda: comm.all_reduce(x, out=array),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="read-only"):
                call()
        assert comm.all_reduce(array, out=np.zeros(4, np.float32)).tolist() == [1] * 4
        assert comm.all_gather(array).tolist() == [1] * 4

    pycomm.run_local(fn, 1)


def test_tensors_on_a_gpu() -> None:
    for kind in (CUDA, MANAGED):
        x = on_device(kind, 3, byte_offset=16)
        found = _native.describe_buffer(x, "x", on_gpu=True)
        assert (found.address, found.dtype, found.count, found.shape) == (4112, "float32", 12, (3, 4))
        assert found.device == 3 and found.writable
        assert x.asked == [{"stream": -1, "max_version": (1, 3)}]  # the caller orders the streams

    class Old(OnDevice):
        def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
            return super().__dlpack__(stream=stream)

    x = on_device(made=Old, name=b"dltensor")
    assert _native.describe_buffer(x, "x", on_gpu=True).device == 1
    assert x.asked == [{"stream": -1}]


def test_a_call_on_the_other_side_says_where_the_tensor_is() -> None:
    x = np.ones(4, np.float32)

    def refused_by_a_group(tensor: Any, where: str) -> None:
        def fn(comm: Communicator) -> None:
            calls: list[Callable[[], Any]] = [
                lambda: comm.all_reduce(tensor),
                lambda: comm.all_reduce(x, out=tensor),
                lambda: comm.all_reduce([tensor]),
                lambda: comm.all_reduce_init(tensor),
                lambda: comm.all_reduce(tensor, codec="int8"),
                lambda: comm.send_recv(x, 0, tensor, 0),
            ]
            for call in calls:
                with pytest.raises(TypeError, match=rf"{where}: this group .*CPU memory, as x.cpu\(\)"):
                    call()

        pycomm.run_local(fn, 1)

    refused_by_a_group(on_device(CUDA, 3), "` is on CUDA device 3")
    refused_by_a_group(on_device(MANAGED, 2), "` is in managed memory of CUDA device 2")
    refused_by_a_group(on_device(METAL), r"nor on a CUDA device \(DLPack device type 8\)")
    # Where it is comes first: nobody copies a tensor to the CPU to hear there that it was strided, say.
    refused_by_a_group(on_device(strides=[1, 3]), "` is on CUDA device 1")
    for tensor, where in (
        (on_device(CPU, 0), "`w` is in CPU memory"),
        (on_device(METAL), r"`w` is neither .* nor on a CUDA device \(DLPack device type 8\)"),
        (on_device(PINNED), r"`w` is neither .* nor on a CUDA device \(DLPack device type 3\)"),
        (x, "`w` is in CPU memory"),
    ):
        with pytest.raises(TypeError, match=rf"{where}: .*NVIDIA GPU, move it there, as x.cuda\(\)"):
            _native.describe_buffer(tensor, "w", on_gpu=True)
        assert getattr(tensor, "asked", []) == []  # an exporter on the CPU knows no streams


def test_exporters_that_contradict_themselves_about_the_device() -> None:
    x = on_device(CPU)
    x.device = CUDA, 0
    with pytest.raises(TypeError, match="`x` is in CPU memory"):
        _native.describe_buffer(x, "x", on_gpu=True)
    for says, why in (
        (None, r"its __dlpack_device__\(\) returned None"),
        ("cuda", r"its __dlpack_device__\(\) returned 'cuda'"),
        ((2, 0, 0), r"its __dlpack_device__\(\) returned \(2, 0, 0\)"),
        (RuntimeError("gone"), r"its __dlpack_device__\(\) raised RuntimeError: gone"),
    ):
        x = on_device()
        x.device = says
        with pytest.raises(TypeError, match=f"`x` cannot be read: {why}"):
            _native.describe_buffer(x, "x", on_gpu=True)
    with pytest.raises(ValueError, match="`x` is described with -2 for a CUDA device's number"):
        _native.describe_buffer(on_device(number=-2), "x", on_gpu=True)


def test_what_a_tensor_on_a_gpu_may_not_be() -> None:
    for changes, error, why in (
        ({"strides": [8, 1]}, ValueError, r"not contiguous in C order: pass x.contiguous\(\)"),
        ({"strides": [1, 3]}, ValueError, r"pass x.permute\(1, 0\), a view of the same memory"),
        ({"data": 0}, TypeError, "has no memory behind its elements"),
        ({"shape": [3, -4]}, ValueError, "an extent of -4"),
        ({"bits": 128}, TypeError, "code 2, 128 bits, lanes 1"),
    ):
        with pytest.raises(error, match=f"`x` .*{why}"):
            _native.describe_buffer(on_device(**changes), "x", on_gpu=True)
    for flags, why in ((1, "is read-only"), (2, "exports a copy"), (3, "exports a copy")):
        found = _native.describe_buffer(on_device(flags=flags), "x", on_gpu=True)
        assert not found.writable
        with pytest.raises(ValueError, match=f"`out` {why}"):
            found.require_writable("out")
    jax = type("Array", (OnDevice,), {"__module__": "jaxlib._jax"})
    found = _native.describe_buffer(on_device(made=jax, name=b"dltensor"), "x", on_gpu=True)
    with pytest.raises(ValueError, match="`x` is read-only"):
        found.require_writable("x")


def test_what_was_exported_is_kept_while_it_is_described() -> None:
    class Kept(OnDevice):
        def __dlpack__(self, **kwargs: Any) -> Any:
            return self.capsule

    x = on_device(made=Kept)
    x.capsule = OnDevice.__dlpack__(x)
    counts = [sys.getrefcount(x.capsule)]
    found = _native.describe_buffer(x, "x", on_gpu=True)
    counts.append(sys.getrefcount(x.capsule))
    del found
    counts.append(sys.getrefcount(x.capsule))
    assert counts == [counts[0], counts[0] + 1, counts[0]]


def test_tensors_of_a_torch_without_the_exchange_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come through DLPack, and what it does not say of them is asked all the same."""

    class Tensor(OnDevice):
        requires_grad, grad_fn, dtype, conjugate, negative = False, None, "torch.float32", False, False

        @property
        def __cuda_array_interface__(self) -> Any:
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad")

        def is_conj(self) -> bool:
            return self.conjugate

        def is_neg(self) -> bool:
            return self.negative

    class Computed(Tensor):
        requires_grad = property(lambda self: True)  # type: ignore[assignment]
        grad_fn = object()

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(Tensor=Tensor))  # type: ignore[arg-type]
    for kind, on_gpu in ((CUDA, True), (CPU, False)):
        x = on_device(kind, made=Tensor)
        assert _native.describe_buffer(x, "x", on_gpu).writable
        x.negative = True
        with pytest.raises(ValueError, match=r"`x` is a negation .*x.resolve_neg\(\)"):
            _native.describe_buffer(x, "x", on_gpu)
        x = on_device(kind, made=Tensor, code=5, bits=64)
        x.conjugate = True
        with pytest.raises(ValueError, match=r"`x` is a conjugate .*x.resolve_conj\(\)"):
            _native.describe_buffer(x, "x", on_gpu)
        with pytest.raises(ValueError, match="`x` has a grad_fn"):
            _native.describe_buffer(on_device(kind, made=Computed), "x", on_gpu).require_writable("x")
