"""The Python interface of the GPU kernels without a GPU; tests/gpu has the rest."""

import subprocess
import sys

import numpy as np
import pytest

import pycomm.cuda.arrays

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
    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...] | None, typestr: str = "<f4") -> None:
        self.device = type("Device", (), {"id": 3})()
        self.__cuda_array_interface__ = {
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "data": (4096, False),
            "version": 3,
        }


def test_the_array_interface_is_read() -> None:
    for strides in (None, (20, 4)):
        found = pycomm.cuda.arrays.describe(Interface((3, 5), strides))
        assert found == pycomm.cuda.arrays.Array(4096, "float32", 15, 3)
    with pytest.raises(ValueError, match="not contiguous in C order"):
        pycomm.cuda.arrays.describe(Interface((3, 5), (4, 12)))


def test_the_array_interface_means_what_it_says() -> None:
    def made(**changes: object) -> Interface:
        x = Interface((3,), None)
        x.__cuda_array_interface__.update(changes)
        return x

    describe = pycomm.cuda.arrays.describe
    assert describe(made()).writable
    read_only = describe(made(data=(4096, True)))
    assert not read_only.writable
    with pytest.raises(ValueError, match="`out` is read-only"):
        pycomm.cuda.arrays.require_writable(read_only, "out")
    assert not describe(type("Array", (Interface,), {"__module__": "jaxlib._jax"})((3,), None)).writable
    for changes, error, why in (
        ({"mask": object()}, ValueError, "has a mask"),
        ({"typestr": ">f4"}, ValueError, "byte-swapped"),
        ({"shape": (-3,)}, ValueError, "extents are 0 or more"),
        ({"data": (0, False)}, TypeError, "no memory"),
    ):
        with pytest.raises(error, match=f"`x` .*{why}"):
            describe(made(**changes))
    assert describe(made(data=(0, False), shape=(0, 3), strides=(0, 0))).count == 0


def test_streams_are_told_by_what_has_their_handle() -> None:
    x = Interface((1,), None)
    assert pycomm.cuda.arrays.stream_handle(None, x, 0) == 0
    assert pycomm.cuda.arrays.stream_handle(7, x, 0) == 7
    assert pycomm.cuda.arrays.stream_handle(type("Torchs", (), {"cuda_stream": 9})(), x, 0) == 9
    assert pycomm.cuda.arrays.stream_handle(type("Cupys", (), {"ptr": 11})(), x, 0) == 11
    with pytest.raises(TypeError, match="`stream` is a str"):
        pycomm.cuda.arrays.stream_handle("default", x, 0)
