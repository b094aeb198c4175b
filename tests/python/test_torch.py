"""Torch's CPU tensors and Parameters."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Rank, outcomes_of

import pycomm
from pycomm import Communicator

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
    """Every rank's tensors, by way of NumPy alone."""
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
