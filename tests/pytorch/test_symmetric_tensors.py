"""Tensors that ranks use in place, made by hand and by FSDP2."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import on_ranks
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from training import SIZE, train

import pycomm.torch
from pycomm import _native


def test_empty() -> None:
    def fn() -> None:
        rank = dist.get_rank()
        for size in (([],), (0,), (3,), (2, 3), ([2, 3],), (torch.Size([4]),)):
            assert pycomm.torch.empty(*size).shape == torch.empty(*size).shape
        assert pycomm.torch.empty(2).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        assert pycomm.torch.empty(2).dtype == torch.float64
        torch.set_default_dtype(torch.float32)
        for dtype in (torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn):
            x = pycomm.torch.empty(3, 2, dtype=dtype)
            assert x.dtype == dtype and not x.to(torch.float32).any()
        x = pycomm.torch.empty(1000, dtype=torch.bfloat16)
        x.fill_(rank + 1)
        dist.all_reduce(x)
        dist.all_reduce(x[500:], op=dist.ReduceOp.AVG, async_op=True).wait()
        assert (x == 3).all()

    on_ranks(fn, SIZE)


def lies_in(x: Any) -> str:
    """What is mapped where the tensor begins."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(None, 5)
        first, end = (int(address, 16) for address in addresses.split("-"))
        if first <= x.data_ptr() < end:
            return name
    return ""


def test_it_lies_in_the_memory_of_its_group() -> None:
    def fn() -> None:
        group = dist.new_group([0, 1])
        x = pycomm.torch.empty(100_000, group=group)
        assert "memfd:pycomm" in lies_in(x) and "memfd:pycomm" not in lies_in(torch.zeros(100_000))
        x.fill_(1)
        dist.all_reduce(x, group=group)
        dist.all_reduce(x)  # of another group, which takes it as any tensor
        assert (x == 4).all()
        dist.destroy_process_group(group)
        assert (x == 4).all()  # it outlives its group

    on_ranks(fn, SIZE)


def test_what_is_refused() -> None:
    def fn() -> None:
        gloo = dist.new_group([0, 1], backend="gloo")
        with pytest.raises(TypeError, match=r'process group is gloo: pass .*init_process_group\("pycomm"\)'):
            pycomm.torch.empty(3, group=gloo)
        with pytest.raises(TypeError, match="process group is 'gloo'"):
            pycomm.torch.empty(3, group="gloo")
        out, x = torch.zeros(4), torch.zeros(2)
        with pytest.raises(TypeError, match="process group is gloo"):
            pycomm.torch.SymmMemAllGather()(out, x, gloo)
        with pytest.raises(TypeError, match="process group is gloo"):
            pycomm.torch.SymmMemReduceScatter()(x, out, gloo, dist.ReduceOp.SUM)
        with pytest.raises(ValueError, match="memory of the CPU, not of meta"):
            pycomm.torch.SymmMemAllGather().allocate((3,), dtype=torch.float32, device=torch.device("meta"))
        with pytest.raises(ValueError, match="rank 1"):
            pycomm.torch.empty(3 + dist.get_rank())
        dist.barrier()

    on_ranks(fn, SIZE)


class Wide(torch.nn.Module):
    """With a weight that shared arrays are worth."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(6, 20000), torch.nn.Linear(20000, 2, bias=False)

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.first(x)))


def sharded(model: Any, gather: Any, scatter: Any, **options: Any) -> Any:
    for layer in model.children():
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(scatter)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp_gathers_and_reduces_in_place(dtype: Any) -> None:
    class Gather(pycomm.torch.SymmMemAllGather):
        def __call__(self, output_tensor: Any, input_tensor: Any, *rest: Any, **more: Any) -> Any:
            seen.append((output_tensor, input_tensor))
            return super().__call__(output_tensor, input_tensor, *rest, **more)

    class Scatter(pycomm.torch.SymmMemReduceScatter):
        def __call__(self, output_tensor: Any, input_tensor: Any, *rest: Any, **more: Any) -> Any:
            seen.append((output_tensor, input_tensor))
            return super().__call__(output_tensor, input_tensor, *rest, **more)

    seen: list[tuple[Any, Any]] = []

    def fn() -> None:
        policy = MixedPrecisionPolicy(param_dtype=dtype)
        found = train(sharded(Wide(), Gather(), Scatter(), mp_policy=policy), steps=3)
        calls = [pair for pair in seen if pair[0].nbytes >= 64 << 10 and pair[1].nbytes >= 64 << 10]
        assert len(calls) >= 3 * 3  # in each step, a gather forward, one backward, and a reduction
        for pair in calls:
            assert all(_native.is_shared_array(x.view(torch.uint8).numpy()) for x in pair)
        plain = Wide()
        for layer in [*plain.children(), plain]:
            fully_shard(layer, mp_policy=policy)
        assert torch.equal(found, train(plain, steps=3))

    on_ranks(fn, SIZE)
