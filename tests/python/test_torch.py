"""Torch's CPU tensors and Parameters."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Rank, outcomes_of

import pycomm
from pycomm import Communicator, _native

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # a child of fork has no other threads of torch's pool

Ranks = Callable[..., list[Any]]

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.uint8, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def test_every_type(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        for dtype in DTYPES:
            x = torch.full((5, 7), comm.rank + 1.0).to(dtype)
            assert comm.all_reduce(x) is x
            assert (x.to(torch.complex128) == 3).all(), dtype
            out = torch.zeros((5, 7), dtype=dtype)
            assert comm.all_reduce(x, out=out, op="sum") is out
            assert (out.to(torch.complex128) == 6).all(), dtype
        flags = torch.tensor([True, False])
        assert comm.all_reduce(flags, op="band").tolist() == [True, False]

    ranks(fn, 2)


def test_parameters_and_gradients(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        torch.manual_seed(comm.rank)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        for parameter in model.parameters():
            assert parameter.requires_grad
            assert comm.broadcast(parameter, root=0) is parameter
        model(torch.full((2, 4), comm.rank + 1.0)).sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        expected = [sum(parts) / 2 for parts in zip(*(
            [torch.from_numpy(part) for part in rank] for rank in gather(comm, gradients)
        ), strict=True)]  # fmt: skip
        comm.all_reduce(gradients, op="avg")
        for got, want in zip(gradients, expected, strict=True):
            assert torch.equal(got, want)

    ranks(fn, 2)


def gather(comm: Communicator, tensors: list[Any]) -> list[list[Any]]:
    """The tensors of all ranks, gathered through NumPy only."""
    parts = [comm.all_gather(t.numpy().reshape(1, *t.shape)) for t in tensors]
    return [[part[rank] for part in parts] for rank in range(comm.size)]


def test_made_results_are_tensors(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = torch.full((2, 3), comm.rank, dtype=torch.bfloat16)
        got = comm.all_gather(x)
        assert isinstance(got, torch.Tensor) and got.dtype == torch.bfloat16 and got.shape == (4, 3)
        assert got.tolist() == [[0] * 3] * 2 + [[1] * 3] * 2
        part = comm.reduce_scatter(torch.arange(6.0))
        assert isinstance(part, torch.Tensor)
        assert part.tolist() == [6 * comm.rank, 6 * comm.rank + 2, 6 * comm.rank + 4]
        assert isinstance(comm.all_to_all(torch.arange(2)), torch.Tensor)
        parameter = torch.nn.Parameter(torch.ones(2))
        assert not comm.all_gather(parameter).requires_grad

    ranks(fn, 2)


def test_mixed_with_numpy(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = torch.ones(5)
        out = np.zeros(5, np.float32)
        assert comm.all_reduce(x, out=out) is out
        assert (out == 2).all()
        symmetric = torch.from_numpy(comm.empty(1000))
        symmetric.fill_(comm.rank + 1)
        assert (comm.all_reduce(symmetric) == 3).all()
        works = [comm.all_reduce(torch.full((100,), float(i)), async_op=True) for i in range(20)]
        assert [work.wait()[0].item() for work in works] == [2.0 * i for i in range(20)]
        op = comm.all_reduce_init(x)
        assert op() is x and (x == 2).all()

    ranks(fn, 2)


def test_tensors_that_are_refused(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = torch.ones(4, 6)
        for bad in (x.t(), x[:, ::2], x[:, :3], torch.ones(1).expand(5)):
            with pytest.raises(ValueError, match=r"not contiguous.*x.contiguous\(\)"):
                comm.all_reduce(bad)
        with pytest.raises(TypeError, match="`x` is not a dense tensor in CPU memory: .*meta"):
            comm.all_reduce(torch.ones(3, device="meta"))
        with pytest.raises(TypeError, match="`x` is not a dense tensor"):
            comm.all_reduce(torch.ones(3).to_sparse())
        with pytest.raises(TypeError, match="avg"):
            comm.all_reduce(torch.ones(3, dtype=torch.int32), op="avg")
        assert comm.all_reduce(torch.ones(1)).item() == comm.size
        assert comm.all_reduce(torch.tensor(2.0)).item() == 4
        assert comm.all_reduce(torch.empty(0)).numel() == 0
        conjugate = torch.ones(3, dtype=torch.complex64).mul_(1j).conj()
        with pytest.raises(ValueError, match=r"x.resolve_conj\(\)"):
            comm.all_reduce(conjugate)
        assert comm.all_reduce(conjugate.resolve_conj())[0].item() == -2j

    ranks(fn, 2)


def test_references_are_returned(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = torch.ones(9)
        before = sys.getrefcount(x)
        for _ in range(50):
            comm.all_reduce(x)
            comm.all_reduce(x, async_op=True).wait()
            comm.all_reduce_init(x)()
        assert sys.getrefcount(x) == before

    ranks(fn, 2)


def test_a_store_of_torch_distributed(tmp_path: Path) -> None:
    def rank(r: int) -> Callable[[], Any]:
        def body() -> Any:
            store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
            with (
                pycomm.init(store=store, rank=r, size=2) as first,
                pycomm.init(store=store, rank=r, size=2) as second,
            ):
                return second.all_reduce(first.all_reduce(torch.ones(2))).tolist()

        return body

    processes: list[Rank] = []
    try:
        for r in range(2):
            processes.append(Rank(rank(r), processes))
        assert outcomes_of(processes, 30) == [[4, 4], [4, 4]]
    finally:
        for process in processes:
            process.kill()


def test_deferred_negation_and_conjugation(ranks: Ranks) -> None:
    """In every kind of call, and also if the memory belongs to a known call."""

    def fn(comm: Communicator) -> None:
        real, whole, complex_ = torch.ones(4), torch.ones(4, dtype=torch.int32), torch.ones(2) * 1j
        one = torch.ones(1, dtype=torch.complex64)
        for x in (real, whole, complex_):
            for _ in range(3):
                comm.all_reduce(x, op="max" if x is not complex_ else "sum")
        moved = one.conj().imag.clone()
        comm.all_reduce(moved)
        moved.data = one.conj().imag  # the same object, with other memory and a lazy bit
        with pytest.raises(ValueError, match="negation"):
            comm.all_reduce(moved)
        negations = [torch._neg_view(real), torch._neg_view(whole), torch._neg_view(complex_)]
        assert one.conj().imag.is_neg()
        for bad in (*negations, one.conj().imag):
            with pytest.raises(ValueError, match=r"negation that has not been computed.*x.resolve_neg\(\)"):
                comm.all_reduce(bad)
            with pytest.raises(ValueError, match="negation"):
                comm.all_gather(bad)
        for bad, remedy in ((torch._neg_view(real), "resolve_neg"), (complex_.conj(), "resolve_conj")):
            calls: list[Callable[[], Any]] = [
                lambda b=bad: comm.all_reduce([b]),
                lambda b=bad: comm.all_reduce(b.clone(), out=b),
                lambda b=bad: comm.all_reduce(b, async_op=True),
                lambda b=bad: comm.all_reduce_init(b),
                lambda b=bad: comm.send(b, 1 - comm.rank),
                lambda b=bad: comm.recv(b, 1 - comm.rank),
                lambda b=bad: comm.send_recv(b, 1 - comm.rank, b.clone(), 1 - comm.rank),
            ]
            for call in calls:
                with pytest.raises(ValueError, match=remedy):
                    call()
        negated = torch._neg_view(real)
        for refused in (
            lambda: pycomm.Bucket([negated]),
            lambda: comm.all_reduce(negated, codec="int8"),
            lambda: _native.encode(_native.Codec("int8"), negated),
        ):
            with pytest.raises(ValueError, match="resolve_neg"):
                refused()
        x = torch.ones(2, dtype=torch.complex64)
        comm.all_reduce(x)
        x.data = x.conj()  # the same object, the same memory
        with pytest.raises(ValueError, match="resolve_conj"):
            comm.all_reduce(x)
        assert comm.all_reduce(negated.resolve_neg()).tolist() == [-2 * v for v in real.tolist()]

    ranks(fn, 2)


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_memory(ranks: Ranks) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, (3,), dtype=torch.float32)

        @classmethod
        def __torch_dispatch__(cls, *_: Any) -> Any:
            raise NotImplementedError

    with FakeTensorMode():
        fake = torch.ones(3)
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)

    def fn(comm: Communicator) -> None:
        quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
        for bad in (fake, Wrapper(), freed, torch._efficientzerotensor(3)):
            with pytest.raises(TypeError, match="`x` has no memory behind its elements"):
                comm.all_reduce(bad)
        for bad in (quantized, torch.eye(3).to_sparse_csr(), torch.ones(3).to_mkldnn()):
            with pytest.raises(TypeError, match="`x` is not a dense tensor"):
                comm.all_reduce(bad)
        for dtype in (torch.complex32, torch.float8_e4m3fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2):
            with pytest.raises(TypeError, match="element type that cannot be communicated"):
                comm.all_gather(torch.empty(3, dtype=dtype))
        for name in ("int4", "uint1", "uint7"):
            with pytest.raises(TypeError, match=f"dtype torch.{name}, which cannot"):
                comm.all_gather(torch.empty(3, dtype=getattr(torch, name)))
        with pytest.raises(ValueError, match="no elements yet.*run the module once"):
            comm.broadcast(torch.nn.LazyLinear(3).weight)

        def in_transform(x: Any) -> Any:
            comm.all_reduce(x)
            return x.sum()

        for transform in (torch.vmap, torch.func.grad, torch.func.functionalize):
            with pytest.raises(TypeError, match="not a dense tensor|no memory"):
                transform(in_transform)(torch.ones(3))

    ranks(fn, 2)


def test_memory_that_is_replaced_under_a_bound_call(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        def resize(x: Any) -> None:
            x.resize_(1 << 16)

        def replace(x: Any) -> None:
            x.data = torch.ones(8)

        def shrink(x: Any) -> None:
            x.resize_(4)

        for change in (resize, replace, shrink, lambda x: x.set_()):
            x, y, out = torch.ones(8), torch.ones(8), torch.ones(8)
            ops = [comm.all_reduce_init(x), comm.all_reduce_init(x, out=y), comm.all_reduce_init(y, out=x)]
            other = comm.all_reduce_init(y, out=out)
            change(x)
            for op, name in zip(ops, ("x", "x", "out"), strict=True):
                with pytest.raises(ValueError, match=f"`{name}` had 8 elements .*bind the call again"):
                    op()
            assert other() is out
            comm.all_reduce(x)  # the call site is bound to the tensor as it is now

    ranks(fn, 2)


def test_memory_that_is_replaced_under_a_started_call(ranks: Ranks) -> None:
    """The call continues in the memory that it began with, which nobody else gets meanwhile."""

    def fn(comm: Communicator) -> None:
        count = 1 << 16
        gate = comm.split(0, comm.rank)
        for drop in (lambda x: x.set_(), lambda x: setattr(x, "data", torch.zeros(count))):
            x, out, listed = (torch.ones(count) for _ in range(3))
            kept = out.detach()
            if comm.rank == 1:
                gate.barrier()
            works = [
                comm.all_reduce(x, async_op=True),
                comm.all_reduce(torch.ones(count), out=out, async_op=True),
                comm.all_reduce([listed], async_op=True),
            ]
            for tensor in (x, out, listed):
                storage = tensor.untyped_storage()._weak_ref()
                drop(tensor)
                assert not torch.UntypedStorage._expired(storage) or all(w.is_completed() for w in works)
                torch.UntypedStorage._free_weak_ref(storage)
            if comm.rank == 0:
                assert not any(work.is_completed() for work in works)
                gate.barrier()
            for work in works:
                work.wait()
            assert (kept == 2).all()

    ranks(fn, 2)


def test_autograd_is_not_written_behind_its_back(ranks: Ranks) -> None:
    """Autograd keeps results to compute gradients from, and would not notice a change."""

    def fn(comm: Communicator) -> None:
        weight = torch.ones(3, requires_grad=True)
        hidden = weight.exp()
        for call in (
            lambda: comm.all_reduce(hidden),
            lambda: comm.all_reduce([hidden]),
            lambda: comm.all_reduce_init(hidden),
            lambda: comm.all_gather(weight, out=hidden.repeat(2)),
        ):
            with pytest.raises(ValueError, match=r"has a grad_fn.*x.detach\(\).clone\(\)"):
                call()
        assert comm.all_reduce(hidden, out=torch.empty(3))[0] > 2  # it may be read
        comm.broadcast(weight.requires_grad_())  # a leaf
        comm.broadcast([weight])

    ranks(fn, 2)


@pytest.mark.filterwarnings("ignore")
def test_tensors_on_a_gpu() -> None:
    """Fake ones, which say where they are and have no memory: empty ones need none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def on_gpu(x: Any) -> _native.Array:
        return _native.describe_buffer(x, "x", on_gpu=True)

    with FakeTensorMode():
        for dtype in DTYPES:
            found = on_gpu(torch.empty((0, 3), dtype=dtype, device="cuda:2"))
            assert f"torch.{found.dtype}" == str(dtype) and found.writable
            assert (found.count, found.shape, found.device) == (0, (0, 3), 2)
        parameter = torch.empty(0, device="cuda", requires_grad=True)
        assert on_gpu(parameter).device == 0
        with pytest.raises(TypeError, match=r"`x` is on CUDA device 0: .*CPU memory, as x.cpu\(\)"):
            _native.describe_buffer(parameter, "x")
        with pytest.raises(ValueError, match=r"conjugate .*x.resolve_conj\(\)"):
            on_gpu(torch.empty(0, dtype=torch.complex64, device="cuda").conj())
        with pytest.raises(ValueError, match=r"negation .*x.resolve_neg\(\)"):
            on_gpu(torch._neg_view(torch.empty(0, device="cuda")))
        with pytest.raises(TypeError, match="`x` has no memory behind its elements"):
            on_gpu(torch.empty(4, device="cuda"))
        with pytest.raises(TypeError, match="nor on a CUDA device .*as x.cuda"):
            on_gpu(torch.empty(4, device="mps"))
    with pytest.raises(TypeError, match=r"`x` is in CPU memory: .*as x.cuda\(\)"):
        on_gpu(torch.ones(3))
    with pytest.raises(TypeError, match="`x` is not a dense tensor in GPU memory: .*meta"):
        on_gpu(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match="no elements yet.*run the module once"):
        on_gpu(torch.nn.LazyLinear(3).weight)
    for x in (torch.ones(3).to_sparse(), torch.eye(3).to_sparse_csr()):
        for describe in (on_gpu, lambda x: _native.describe_buffer(x, "x")):
            with pytest.raises(TypeError, match=r"`x` is not a dense tensor \(torch.sparse_.*x.to_dense\(\)"):
                describe(x)


def test_empty_tensors_keep_their_type(ranks: Ranks) -> None:
    """They have no address. A rank that has only one of the two buffers takes the type from that."""

    def fn(comm: Communicator) -> None:
        for dtype in (torch.uint8, torch.float64, torch.bfloat16):
            x = torch.zeros(0, dtype=dtype)
            if comm.rank == 0:
                comm.send(x, 1)
                comm.send(torch.ones(3, dtype=dtype), 1)
            else:
                comm.recv(x, 0)
                y = torch.zeros(3, dtype=dtype)
                comm.recv(y, 0)
                assert (y == 1).all()
            comm.gather(x, root=1)
            if comm.rank == 0:
                comm.scatter(torch.zeros(0, dtype=dtype), out=x)
            else:
                comm.scatter(out=x)
            comm.all_reduce(x)

    ranks(fn, 2)
