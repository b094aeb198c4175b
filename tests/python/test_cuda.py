"""The Python interface of the GPU kernels without a GPU; tests/gpu has the rest."""

import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pycomm.cuda.arrays
from pycomm.cuda.bucket import GpuPacking

without_gpu = pytest.mark.skipif(pycomm.cuda.is_available(), reason="there is a GPU")


def test_importing_loads_no_kernels() -> None:
    script = "import sys, pycomm, pycomm.cuda; print('pycomm._cuda' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@without_gpu
def test_what_is_missing_is_said() -> None:
    x = np.zeros(3, np.float32)
    for call in (
        pycomm.cuda.arrays.native,
        lambda: pycomm.cuda.reduce([x], x),
        lambda: pycomm.cuda.encode("int8", x),
    ):
        with pytest.raises((RuntimeError, TypeError)) as caught:
            call()
        if caught.type is RuntimeError:
            assert "install" in str(caught.value)


def test_arrays_elsewhere_are_refused() -> None:
    with pytest.raises(TypeError, match=r"`x` is a list: pass a CuPy array"):
        pycomm.cuda.arrays.describe([1.0])
    with pytest.raises(TypeError, match=r"`x` is in CPU memory"):
        pycomm.cuda.arrays.describe(np.zeros(3))


class Interface:
    """An array on a device that nobody has, which is counted each time that it is read."""

    def __init__(
        self, shape: Any, strides: Any = None, typestr: str = "<f4", address: Any = 4096, **others: Any
    ) -> None:
        self.device: Any = SimpleNamespace(id=3)  # as CuPy says it
        self.interface = {
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "data": (address, False),
            "version": 3,
            **others,
        }
        self.reads = 0

    @property
    def __cuda_array_interface__(self) -> Any:
        self.reads += 1
        return self.interface


describe = pycomm.cuda.arrays.describe


def test_the_array_interface_is_read() -> None:
    for strides in (None, (20, 4)):
        found = describe(Interface((3, 5), strides))
        assert (found.address, found.dtype, found.count, found.shape) == (4096, "float32", 15, (3, 5))
        assert found.device == 3 and found.writable
    assert describe(Interface((3, 1, 5), (20, 7, 4))).count == 15  # a stride that leads nowhere
    for dtype in ("float64", "int8", "uint16", "int64", "bool", "complex64"):
        assert describe(Interface((), typestr=np.dtype(dtype).str)).dtype == dtype
    with pytest.raises(ValueError, match="not contiguous in C order: pass a contiguous copy"):
        describe(Interface((3, 5), (24, 4)))
    with pytest.raises(ValueError, match=r"pass x.transpose\(1, 0\), a view of the same memory"):
        describe(Interface((3, 5), (4, 12)))


def test_the_array_interface_means_what_it_says() -> None:
    assert describe(Interface((3,))).writable
    read_only = describe(Interface((3,), data=(4096, True)))
    assert not read_only.writable
    with pytest.raises(ValueError, match="`out` is read-only"):
        read_only.require_writable("out")
    assert not describe(type("Array", (Interface,), {"__module__": "jaxlib._jax"})((3,))).writable
    for changes, error, why in (
        ({"mask": object()}, ValueError, "has a mask"),
        ({"typestr": ">f4"}, ValueError, "byte-swapped"),
        ({"typestr": "<U4"}, TypeError, "has dtype <U4, which cannot be communicated"),
        ({"shape": (-3,)}, ValueError, "extents are 0 or more"),
        ({"shape": (1 << 40, 1 << 40)}, ValueError, r"2\^63 bytes or more"),
        ({"shape": (3, 3), "strides": (4,)}, ValueError, "2 extents and 1 strides"),
        ({"data": (0, False)}, TypeError, "no memory"),
        ({"data": (None, False)}, TypeError, "no memory"),
        ({"data": ((1 << 64) - 8, False)}, ValueError, "an end beyond the last address"),
        ({"data": None}, TypeError, "cannot be read: its __cuda_array_interface__ is {"),
        ({"data": ("4096", False)}, TypeError, "cannot be read"),
        ({"shape": None}, TypeError, "cannot be read"),
        ({"shape": 3}, TypeError, "cannot be read"),
    ):
        with pytest.raises(error, match=f"`x` .*{why}"):
            describe(Interface(**{"shape": (3,), **changes}))
    with pytest.raises(TypeError, match=r"`x` cannot be read: its __cuda_array_interface__ is \[\]"):
        describe(SimpleNamespace(__cuda_array_interface__=[]))
    for typestr in (None, "junk"):
        with pytest.raises(TypeError, match="is no element type"):
            describe(Interface((3,), typestr=typestr))
    for empty in (0, None):
        assert describe(Interface((0, 3), (0, 0), address=empty)).count == 0


def test_an_array_interface_whose_array_has_a_dtype() -> None:
    """The interface has no letters for the types of ml_dtypes."""

    def made(typestr: str, dtype: Any) -> Interface:
        x = Interface((3,), typestr=typestr)
        x.dtype = dtype  # type: ignore[attr-defined]
        return x

    for name, typestr in (("bfloat16", "<V2"), ("float8_e4m3fn", "|V1"), ("float8_e5m2", "|V1")):
        assert describe(made(typestr, np.dtype(getattr(ml_dtypes, name)))).dtype == name
    assert describe(made("<f4", "of another library")).dtype == "float32"
    with pytest.raises(TypeError, match="`x` has dtype float64, and its interface says float32: pass a copy"):
        describe(made("<f4", np.dtype("float64")))
    for letters, own in (("<f4", ">f4"), (">f4", "<f4")):
        with pytest.raises(ValueError, match="`x` is byte-swapped"):
            describe(made(letters, np.dtype(own)))
    for unknown in (np.dtype("M8[s]"), np.dtype(ml_dtypes.float8_e4m3fnuz)):
        with pytest.raises(TypeError, match=f"`x` has dtype {re.escape(str(unknown))}, which cannot be"):
            describe(made(unknown.str, unknown))


def test_where_an_array_says_not_which_device_it_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def device_of(address: int, name: str) -> int:
        asked.append((address, name))
        return 5

    monkeypatch.setattr(pycomm.cuda.arrays, "native", lambda: SimpleNamespace(device_of=device_of))
    for device in (None, 7, "cuda:1", SimpleNamespace(id="1")):
        x = Interface((3,))
        x.device = device
        assert describe(x, "w").device == 5
    assert asked == [(4096, "w")] * 4
    x.interface.update(shape=(0,), data=(0, False))
    assert describe(x).device == 0 and len(asked) == 4  # nothing is anywhere
    x.device = SimpleNamespace(id=-1)
    with pytest.raises(ValueError, match="`x` is described with -1 for a CUDA device's number"):
        describe(x)
    x.device = SimpleNamespace(id=2**40)
    with pytest.raises(ValueError, match="`device.id` of the array is 1099511627776"):
        describe(x)


def test_a_group_refuses_what_is_on_a_gpu() -> None:
    nowhere = Interface((3,))
    nowhere.device = None

    def fn(comm: pycomm.Communicator) -> None:
        for x, where in ((Interface((3,)), "on CUDA device 3"), (nowhere, "on a CUDA device")):
            for passed in (x, [x]):
                with pytest.raises(TypeError, match=f"`x.*` is {where}: this group communicates CPU buffers"):
                    comm.all_reduce(passed)

    pycomm.run_local(fn, 1)


class Kernels:
    """Stands in for pycomm._cuda: keeps what a call hands to its kernel."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **_: self.calls.append((name, *args))

    def Where(self, device: int, stream: int, blocks: int) -> Any:
        return device, stream, blocks

    def Codec(self, kind: str, *_: Any) -> str:
        return kind

    def Encoding(self, *args: Any, **named: Any) -> Any:
        return "encoding"

    def topk_workspace_bytes(self, count: int) -> int:
        return 8 * count

    def Packing(self, bucket: int, dtype: str, items: Any) -> Any:
        self.calls.append(("Packing", bucket, dtype, items))
        return self


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    found = Kernels()
    for module in (pycomm.cuda.arrays, pycomm.cuda.codecs, pycomm.cuda.kernels):
        monkeypatch.setattr(module, "native", lambda: found)
    return found


def floats(count: int, address: int) -> Interface:
    return Interface((count,), address=address)


def bytes_(count: int, address: int) -> Interface:
    return Interface((count,), typestr="|u1", address=address)


def test_kernels_get_what_was_read_once(kernels: Kernels) -> None:
    wire = pycomm._native.Codec("int8").wire_bytes(1024)
    a, b, out = floats(1024, 0x1000), floats(1024, 0x2000), floats(1024, 0x3000)
    w, e, f = bytes_(wire, 0x4000), floats(1024, 0x5000), floats(1024, 0x6000)
    q, amax = Interface((1024,), typestr="<i2", address=0x7000), floats(8, 0x8000)
    record, room = bytes_(16 + 8 * 5, 0x9000), bytes_(8 * 1024, 0xA000)
    arrays = (a, b, out, w, e, f, q, amax, record, room)
    where = (3, 7, 2)  # the arrays' device, and the options
    options: dict[str, Any] = {"stream": 7, "blocks": 2}
    sums, ends = (1024, 1.0, 1), (1024, 1.0, 1.0, "encoding")
    cuda = pycomm.cuda
    for call, want in (
        (
            lambda: cuda.reduce([a, b], out, **options),
            ("combine", where, "float32", "sum", [0x1000, 0x2000], ["raw"] * 2, [0x3000], "final", *sums),
        ),
        (
            lambda: cuda.encode("int8", a, w, residual=e, next_residual=f, **options),
            ("transcode", where, "int8", "float32", [0x1000], ["raw"], [0x4000], "wire", *ends),
        ),
        (
            lambda: cuda.decode("int8", w, out, **options),
            ("transcode", where, "int8", "float32", [0x4000], ["wire"], [0x3000], "final", *ends),
        ),
        (
            lambda: cuda.shared_amax(a, amax, **options),
            ("shared_amax", where, "float32", 0x1000, 1024, 0x8000, "encoding"),
        ),
        (
            lambda: cuda.shared_encode(a, amax, q, world=2, **options),
            ("shared_encode", where, "float32", 0x1000, 1024, 0x8000, 16, 2, 0, "encoding", 0x7000),
        ),
        (
            lambda: cuda.shared_decode(q, amax, out, world=2, **options),
            ("shared_decode", where, 0x7000, 1024, 0x8000, 16, 2, 1.0, "float32", 0x3000),
        ),
        (
            lambda: cuda.topk_encode(a, 5, record, residual=e, next_residual=f, workspace=room, **options),
            ("topk_encode", where, "float32", 0x1000, 1024, 5, 0x9000, 0x5000, 0x6000, 1.0, 0xA000),
        ),
        (
            lambda: cuda.topk_decode_add(record, 5, out, **options),
            ("topk_decode_add", where, 0x9000, 5, 0x3000, 1024),
        ),
    ):
        for x in arrays:
            x.reads = 0
        call()
        assert kernels.calls.pop() == want
        assert {x.reads for x in arrays} == {0, 1}, want[0]


def test_packing_on_a_gpu_is_bound_to_what_was_read(kernels: Kernels) -> None:
    a, b, bucket = floats(100, 0x1000), floats(3, 0x2000), floats(1024, 0x3000)
    packing = pycomm.cuda.Packing([a, b], [0, 256], bucket)
    assert kernels.calls.pop() == (
        "Packing", 0x3000, "float32", [(0x1000, "float32", 100, 0), (0x2000, "float32", 3, 256)],
    )  # fmt: skip
    packing.pack(0.5, stream=7)
    packing.unpack(2.0, stream=7, blocks=4)
    assert kernels.calls == [("pack", (3, 7, 0), 0.5, 0), ("unpack", (3, 7, 4), 2.0, 0)]
    assert [x.reads for x in (a, b, bucket)] == [1, 1, 1]
    b.interface["data"] = (0x2000, True)
    packing = pycomm.cuda.Packing([a, b], [0, 256], bucket)
    with pytest.raises(ValueError, match="`tensors` is read-only"):
        packing.unpack()


def test_a_bucket_on_a_gpu_binds_anew_what_has_moved(kernels: Kernels) -> None:
    a, b, data = floats(100, 0x1000), floats(3, 0x2000), floats(512, 0x3000)
    packing = GpuPacking(data, [0, 256], [100, 3])
    packing.check_unpack([a, b])
    packing.check_unpack([a, b])
    assert [name for name, *_ in kernels.calls] == ["Packing"]
    for move, bound in (
        ({"data": (0x2100, False)}, 2),
        ({"shape": (3, 1)}, 2),  # the same elements
        ({"typestr": "<f2"}, 3),
    ):
        b.interface.update(move)
        packing.check_unpack([a, b])
        assert len(kernels.calls) == bound, move
    b.interface.update(data=(0x2100, True))
    with pytest.raises(ValueError, match="`tensors` is read-only"):
        packing.check_unpack([a, b])
    b.interface.update(data=(0x3000, False))
    with pytest.raises(ValueError, match=r"`tensors\[1\]` lies in the bucket's memory, but not in its place"):
        packing.check_unpack([a, b])
    b.interface.update(shape=(4,))
    with pytest.raises(ValueError, match=r"`tensors\[1\]` has 4 elements where the bucket has 3"):
        packing.check_unpack([a, b])


def test_calls_that_are_refused_reach_no_kernel(kernels: Kernels) -> None:
    a, out = floats(8, 0x1000), floats(8, 0x2000)
    elsewhere, read_only = floats(8, 0x3000), Interface((8,), data=(0x4000, True))
    elsewhere.device = SimpleNamespace(id=1)
    marked = Interface((8,), mask=object())
    host = np.zeros(8, np.float32)
    for call, error, why in (
        (lambda: pycomm.cuda.reduce([a, elsewhere], out), ValueError, "is on device 1, and others are on 3"),
        (lambda: pycomm.cuda.reduce([a, a], read_only), ValueError, "`out` is read-only"),
        (lambda: pycomm.cuda.reduce([a, marked], out), ValueError, "`srcs` has a mask"),
        (lambda: pycomm.cuda.reduce([a, host], out), TypeError, "`srcs` is in CPU memory.*x.cuda"),
        (lambda: pycomm.cuda.encode("int8", host), TypeError, "`x` is in CPU memory"),
        (lambda: pycomm.cuda.encode("int8", a, read_only), ValueError, "`out` is read-only"),
        (lambda: pycomm.cuda.decode("int8", a, host, add=True), TypeError, "`out` is in CPU memory"),
        (lambda: pycomm.cuda.topk_encode(a, 1, bytes_(9, 0x5000)), TypeError, "memory .*pass it yourself"),
        (
            lambda: pycomm.cuda.topk_encode(a, 1, bytes_(9, 0x5000), workspace=bytes_(64, 0x6000)),
            ValueError,
            "`out` has 9 bytes: a record of 1 elements takes 24",
        ),
        (
            lambda: pycomm.cuda.topk_encode(a, 1, bytes_(24, 0x5000), workspace=bytes_(63, 0x6000)),
            ValueError,
            "`workspace` has 63 bytes: 64 are needed",
        ),
        (lambda: pycomm.cuda.topk_decode_add(a, 1, read_only), ValueError, "`sum` is read-only"),
        (lambda: pycomm.cuda.shared_amax(a, read_only), ValueError, "`amax` is read-only"),
        (lambda: pycomm.cuda.Packing([host], [0], a), TypeError, "`tensors` is in CPU memory"),
        (lambda: pycomm.Bucket([a, host]), TypeError, r"`tensors\[1\]` is not on a GPU"),
        (lambda: pycomm.Bucket([a, marked]), ValueError, r"`tensors\[1\]` has a mask"),
    ):
        with pytest.raises(error, match=why):
            call()
    assert kernels.calls == []


def test_new_bytes_come_from_the_library_of_the_arrays(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def new_bytes(size: int, like: Any, device: int, stream: int) -> Interface:
        made.append((size, like, device, stream))
        return bytes_(size, 0x10000 * len(made))

    for module in (pycomm.cuda.arrays, pycomm.cuda.codecs):
        monkeypatch.setattr(module, "new_bytes", new_bytes)
    a = floats(1024, 0x1000)
    wire = pycomm._native.Codec("int8").wire_bytes(1024)
    assert pycomm.cuda.encode("int8", a, stream=7).interface["data"][0] == 0x10000
    assert kernels.calls.pop()[4:9] == ([0x1000], ["raw"], [0x10000], "wire", 1024)
    assert pycomm.cuda.topk_encode(a, 5, stream=7).interface["data"][0] == 0x20000
    assert kernels.calls.pop()[6:] == (0x20000, 0, 0, 1.0, 0x30000)
    assert made == [(size, a, 3, 7) for size in (wire, 16 + 8 * 5, 8 * 1024)]


def test_streams_are_told_by_what_has_their_handle() -> None:
    x = Interface((1,))
    assert pycomm.cuda.arrays.stream_handle(None, x, 0) == 0
    assert pycomm.cuda.arrays.stream_handle(7, x, 0) == 7
    assert pycomm.cuda.arrays.stream_handle(type("Torchs", (), {"cuda_stream": 9})(), x, 0) == 9
    assert pycomm.cuda.arrays.stream_handle(type("Cupys", (), {"ptr": 11})(), x, 0) == 11
    with pytest.raises(TypeError, match="`stream` is a str"):
        pycomm.cuda.arrays.stream_handle("default", x, 0)
