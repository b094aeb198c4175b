"""Every collective of torch.distributed, beside Gloo's result on the same inputs, at 1, 2 and 3 ranks."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import on_ranks

SIZES = (1, 2, 3)
CASES: dict[str, Callable[[], Any]] = {}

warnings.simplefilter("ignore", FutureWarning)  # torch's names that are to go are names still


def case(fn: Callable[[], Any]) -> Callable[[], Any]:
    CASES[fn.__name__] = fn
    return fn


def whole(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Any:
    """Small whole numbers, other ones on each rank: sums and products are exact."""
    generator = torch.Generator().manual_seed(10 * dist.get_rank() + seed)
    return torch.randint(1, 5, shape, generator=generator).to(dtype)


def reduced(op: Any, *dtypes: Any) -> list[Any]:
    results = []
    for dtype in dtypes:
        for shape in [(), (1,), (0,), (3, 5), (70_000,)]:
            x = whole(*shape, dtype=dtype)
            dist.all_reduce(x, op)
            results.append(x)
    return results


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)


@case
def all_reduce_sum() -> Any:
    return reduced(dist.ReduceOp.SUM, *FLOATS, *INTEGERS)


@case
def all_reduce_product() -> Any:
    return reduced(dist.ReduceOp.PRODUCT, *FLOATS, *INTEGERS)


@case
def all_reduce_min_max() -> Any:
    return [reduced(op, *FLOATS, *INTEGERS) for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX)]


@case
def all_reduce_bits() -> Any:
    return [reduced(op, *INTEGERS) for op in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)]


@case
def all_reduce_complex() -> Any:
    x = torch.complex(whole(4), whole(4, seed=1))
    dist.all_reduce(x)
    return x


@case
def all_reduce_sparse() -> Any:
    """Rank r has r elements, two of them at equal indices."""
    rank, results = dist.get_rank(), []
    for dense in ((), (3,), (0,)):
        for dtype in (torch.float32, torch.float64, torch.int64, torch.bfloat16):
            rows = torch.arange(rank) // 2
            x = torch.sparse_coo_tensor(
                torch.stack([rows, rows + 1]), whole(rank, *dense, dtype=dtype), (4, 5, *dense)
            )
            dist.all_reduce(x)
            results.append(x.to_dense())
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    return results, x.to_dense(), x.is_coalesced()


@case
def all_reduce_coalesced() -> Any:
    tensors = [whole(3), whole(2, 2, seed=1), whole(50_000, seed=2), whole(0)]
    dist.all_reduce_coalesced(tensors)
    again = [whole(3), whole(2, 2, seed=1)]
    future = dist.all_reduce_coalesced(again, async_op=True)
    future.wait()
    return tensors, again


@case
def reduce() -> Any:
    results = []
    for root in range(dist.get_world_size()):
        x = whole(7)
        dist.reduce(x, root, dist.ReduceOp.MAX)
        results.append(x if dist.get_rank() == root else None)
    return results


@case
def broadcast() -> Any:
    results = []
    for root in range(dist.get_world_size()):
        for dtype in (*FLOATS, *INTEGERS, torch.bool, torch.complex64):
            x = whole(2, 3, dtype=dtype)
            dist.broadcast(x, root)
            results.append(x)
    return results


@case
def all_gather() -> Any:
    results = []
    for dtype in (*FLOATS, *INTEGERS, torch.complex64, torch.bool):
        for shape in [(), (3,), (2, 3), (0,)]:
            out = [torch.zeros(shape, dtype=dtype) for _ in range(dist.get_world_size())]
            dist.all_gather(out, whole(*shape, dtype=dtype))
            results.append(out)
    return results


@case
def all_gather_into_tensor() -> Any:
    out = torch.zeros(2 * dist.get_world_size(), 3)
    dist.all_gather_into_tensor(out, whole(2, 3))
    return out


@case
def all_gather_coalesced() -> Any:
    inputs = [whole(2), whole(3, 1, seed=1)]
    outputs = [[torch.zeros_like(x) for x in inputs] for _ in range(dist.get_world_size())]
    dist.all_gather_coalesced(outputs, inputs)
    return outputs


@case
def coalescing_manager() -> Any:
    n = dist.get_world_size()
    sums = [whole(4), whole(5, seed=1)]
    with dist._coalescing_manager():
        for x in sums:
            dist.all_reduce(x)
    gathered = [torch.zeros(2 * n), torch.zeros(3 * n)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for out in gathered:
            dist.all_gather_into_tensor(out, whole(out.numel() // n))
    manager.wait()
    parts = [torch.zeros(2), torch.zeros(3)]
    with dist._coalescing_manager():
        for out in parts:
            dist.reduce_scatter_tensor(out, whole(out.numel() * n))
    return sums, gathered, parts


@case
def gather() -> Any:
    results = []
    for root in range(dist.get_world_size()):
        mine = dist.get_rank() == root
        out = [torch.zeros(2, 3) for _ in range(dist.get_world_size())] if mine else None
        dist.gather(whole(2, 3), out, root)
        results.append(out)
    return results


@case
def scatter() -> Any:
    results = []
    for root in range(dist.get_world_size()):
        mine = dist.get_rank() == root
        parts = [whole(2, 3, seed=i) for i in range(dist.get_world_size())] if mine else None
        out = torch.zeros(2, 3)
        dist.scatter(out, parts, root)
        results.append(out)
    return results


@case
def reduce_scatter() -> Any:
    results = []
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
        out = torch.zeros(2, 3)
        dist.reduce_scatter(out, [whole(2, 3, seed=i) for i in range(dist.get_world_size())], op)
        results.append(out)
    return results


@case
def reduce_scatter_tensor() -> Any:
    out = torch.zeros(2, 3)
    dist.reduce_scatter_tensor(out, whole(2 * dist.get_world_size(), 3))
    return out


@case
def all_to_all() -> Any:
    n = dist.get_world_size()
    out = [torch.zeros(2, 3) for _ in range(n)]
    dist.all_to_all(out, [whole(2, 3, seed=i) for i in range(n)])
    return out


@case
def all_to_all_single() -> Any:
    rank, n = dist.get_rank(), dist.get_world_size()
    equal, unequal = torch.zeros(2 * n, 3), torch.zeros(sum(i + 2 * rank for i in range(n)), 3)
    dist.all_to_all_single(equal, whole(2 * n, 3))
    sent = [rank + 2 * i for i in range(n)]
    dist.all_to_all_single(unequal, whole(sum(sent), 3, seed=1), [i + 2 * rank for i in range(n)], sent)
    return equal, unequal


@case
def objects() -> Any:
    rank, n = dist.get_rank(), dist.get_world_size()
    everyones: list[Any] = [None] * n
    dist.all_gather_object(everyones, {"rank": rank, "text": "x" * rank})
    mine = [(rank, "tuple"), None]
    dist.broadcast_object_list(mine, n - 1)
    gathered: Any = [None] * n if rank == 0 else None
    dist.gather_object([rank], gathered, 0)
    part: list[Any] = [None]
    dist.scatter_object_list(part, [{"to": i} for i in range(n)] if rank == 0 else None, 0)
    return everyones, mine, gathered, part


@case
def messages() -> Any:
    """Around a ring, long ones and short ones, and objects."""
    rank, n = dist.get_rank(), dist.get_world_size()
    if n == 1:
        return None
    right, left = (rank + 1) % n, (rank - 1) % n
    received = [torch.zeros(count) for count in (5, 0, 600_000)]
    works = [dist.isend(whole(x.numel(), seed=x.numel()), right) for x in received]
    works += [dist.irecv(x, left) for x in received]
    for work in works:
        work.wait()
    out: list[Any] = [None, None]
    if rank == 0:
        dist.send(torch.arange(3), 1)
        dist.send_object_list(["a", 2], 1)
    elif rank == 1:
        x = torch.zeros(3, dtype=torch.int64)
        assert dist.recv(x, 0) == 0
        received.append(x)
        dist.recv_object_list(out, 0)
    return received, out


@case
def messages_take_their_tags() -> Any:
    rank, n = dist.get_rank(), dist.get_world_size()
    if n == 1:
        return None
    counts = {7: 4, 3: 300_000, 5: 2, 0: 1}
    if rank == 0:
        for work in [
            dist.isend(torch.full((count,), float(tag)), 1, tag=tag) for tag, count in counts.items()
        ]:
            work.wait()
    out = {tag: torch.zeros(counts[tag]) for tag in (0, 5, 3, 7)}
    if rank == 1:
        for work in [dist.irecv(x, 0, tag=tag) for tag, x in out.items()]:
            work.wait()
    return out


@case
def messages_from_any_rank() -> Any:
    """Who comes first is open, the order of each rank's messages is not."""
    rank, n = dist.get_rank(), dist.get_world_size()
    if rank > 0:
        works = [dist.isend(torch.tensor([rank, i]), 0, tag=int(i == 3)) for i in range(4)]
        for work in works:
            work.wait()
        dist.barrier()
        return None
    out = torch.zeros(2, dtype=torch.int64)
    tagged, found = [], []
    for _ in range(n - 1):
        dist.irecv(out, tag=1).wait()
        tagged.append(out.tolist())
    for _ in range(3 * (n - 1)):
        dist.irecv(out).wait()
        found.append(out.tolist())
    dist.barrier()  # what other cases send is not for these receives
    return sorted(tagged), [[each for each in found if each[0] == source] for source in range(n)]


@case
def batch_of_messages() -> Any:
    rank, n = dist.get_rank(), dist.get_world_size()
    if n == 1:
        return None
    out = torch.zeros(4)
    ops = [
        dist.P2POp(dist.irecv, out, (rank - 1) % n),
        dist.P2POp(dist.isend, whole(4), (rank + 1) % n),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return out


@case
def asynchronous() -> Any:
    x, y = whole(10), whole(100_000, seed=1)
    works = [dist.all_reduce(x, async_op=True), dist.all_reduce(y, async_op=True)]
    future = works[1].get_future().then(lambda f: f.value()[0] * 2)
    doubled = future.wait()
    for work in works:
        assert work.wait() and work.get_future().done()
    assert [r.data_ptr() for r in works[0].get_future().value()] == [x.data_ptr()]
    barrier = dist.barrier(async_op=True)
    barrier.wait()
    dist.barrier()
    return x, y, doubled


@case
def groups() -> Any:
    """Every pair and every rank by itself, made in one order; ranks have other numbers there."""
    rank, n = dist.get_rank(), dist.get_world_size()
    members = [[i] for i in range(n)] + [[i, j] for i in range(n) for j in range(i)]
    results = []
    for ranks in members:
        group = dist.new_group(ranks)
        if rank in ranks:
            x = whole(3)
            dist.all_reduce(x, group=group)
            dist.broadcast(x, ranks[-1], group=group)
            results.append(x)
            assert dist.get_group_rank(group, rank) == group.rank()
            dist.destroy_process_group(group)
    return results


@functools.cache
def results(size: int, backend: str) -> list[dict[str, Any]]:
    return on_ranks(lambda: {name: fn() for name, fn in CASES.items()}, size, backend)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_beside_gloo(name: str, size: int) -> None:
    expected = [result[name] for result in results(size, "gloo")]
    found = [result[name] for result in results(size, "pycomm")]
    assert same(found, expected), f"{found} is not {expected}"


def same(found: Any, expected: Any) -> bool:
    """In values, types and shapes."""
    if isinstance(expected, torch.Tensor):
        return (
            isinstance(found, torch.Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
        )
    if isinstance(expected, list | tuple):
        return (
            isinstance(found, list | tuple)
            and len(found) == len(expected)
            and all(map(same, found, expected))
        )
    if isinstance(expected, dict):
        return isinstance(found, dict) and same(list(found.items()), list(expected.items()))
    return bool(found == expected)
