"""GradientReducer on torch's parameters: hooks, views of buckets, parameters that are not used."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pycomm
from pycomm import Communicator, GradientReducer

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # a child of fork has no other threads of torch's pool

Ranks = Callable[..., list[Any]]
SMALL = 0.0005  # MiB: several buckets of model()


def alike(net: Any) -> Any:
    """Weights that do not depend on torch's own generator, which rank threads share."""
    generator = torch.Generator().manual_seed(3)
    for p in net.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return net


def model(dtype: Any = torch.float64) -> Any:
    tanh, linear = torch.nn.Tanh, torch.nn.Linear
    net = torch.nn.Sequential(linear(8, 16), tanh(), linear(16, 16), tanh(), linear(16, 4))
    return alike(net).to(dtype)


def batch(rank: int, step: int, dtype: Any) -> Any:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(6, 8, generator=generator).to(dtype)


def losses(parts: list[Any], of: Any) -> Any:
    """The mean over ranks, as one rank alone computes it."""
    return torch.stack([of(x).square().mean() for x in parts]).mean()


@pytest.mark.parametrize("order", ["ready", "reverse", "priority"])
@pytest.mark.parametrize("as_views", [True, False])
def test_trains_as_one_rank_does(ranks: Ranks, order: Any, as_views: bool) -> None:
    """Within float32's rounding of a reference in float64; the same bits on all ranks."""

    def fn(comm: Communicator) -> list[Any]:
        mine, reference = model(torch.float32), model()
        reducer = GradientReducer(
            mine.parameters(), comm, bucket_mb=SMALL, order=order, gradient_as_bucket_view=as_views
        )
        reducer.attach()
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (mine, reference)]
        for step in range(8):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=step % 2 == 0)
            mine(batch(comm.rank, step, torch.float32)).square().mean().backward()
            stats = reducer.finish()
            losses([batch(rank, step, torch.float64) for rank in range(comm.size)], reference).backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
            assert stats is not None and abs(stats.norm - norm) < 1e-5 * norm
            for optimizer in optimizers:
                optimizer.step()
        assert len(reducer.buckets) > 2
        for p, q in zip(mine.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-5)
        return [p.detach().numpy().tobytes() for p in mine.parameters()]

    all_ranks = ranks(fn, 3)
    assert all_ranks == [all_ranks[0]] * 3


def test_gradients_come_to_lie_in_the_buckets(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        net = model(torch.float32)
        reducer = GradientReducer(net.parameters(), comm, bucket_mb=SMALL, order="reverse")
        reducer.attach()
        places: list[int] = []
        for step in range(3):
            net(batch(comm.rank, step, torch.float32)).sum().backward()
            reducer.finish()
            now = [p.grad.data_ptr() for p in net.parameters()]
            places = places or now
            assert now == places
            reducer.zero_grad()
            assert all(not p.grad.any() for p in net.parameters())
        reducer.detach()
        net(batch(comm.rank, 0, torch.float32)).sum().backward()
        with pytest.raises(ValueError, match="not ready"):
            reducer.finish()

    ranks(fn, 2)


class Branches(torch.nn.Module):
    """Rank r uses layer r, and all use the last; nobody uses `spare`."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
        self.last = torch.nn.Linear(8, 1)
        self.spare = torch.nn.Linear(8, 1)

    def forward(self, x: Any, branch: int) -> Any:
        return self.last(self.branches[branch](x))


@pytest.mark.parametrize("order", ["ready", "priority"])
def test_parameters_that_nobody_uses_have_no_gradient(ranks: Ranks, order: Any) -> None:
    def fn(comm: Communicator) -> None:
        net, reference = alike(Branches()), alike(Branches())
        reducer = GradientReducer(net.parameters(), comm, bucket_mb=SMALL, order=order, find_unused=True)
        reducer.attach()
        for step in range(3):
            for each in (net, reference):
                each.zero_grad()
            net(batch(comm.rank, step, torch.float32), comm.rank).sum().backward()
            reducer.finish()
            losses = [reference(batch(rank, step, torch.float32), rank).sum() for rank in range(2)]
            (sum(losses) / 2).backward()
            for (name, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
                if name.startswith("spare"):
                    assert p.grad is None and q.grad is None
                else:
                    torch.testing.assert_close(p.grad, q.grad)

    ranks(fn, 2)


def test_gradients_that_cannot_be_averaged_are_refused(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        table = torch.nn.Embedding(10, 3, sparse=True)
        reducer = GradientReducer(table.parameters(), comm, names=["table"])
        with pytest.raises(ValueError, match="'table' is not there.*unused"):
            reducer.ready(0)
        table(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(ValueError, match="'table' is sparse.*sparse=False"):
            reducer.ready(0)
        with pytest.raises(ValueError, match="frozen"):
            GradientReducer([torch.nn.Parameter(torch.zeros(3), requires_grad=False)], comm)
        reducer.attach()
        with pytest.raises(ValueError, match="a second time"):
            reducer.attach()

    ranks(fn, 1)


def test_accumulated_passes_are_sent_once(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        net, reference = model(torch.float32), model()
        reducer = GradientReducer(net.parameters(), comm, bucket_mb=SMALL)
        reducer.attach()
        for step in range(3):
            net.zero_grad()
            reference.zero_grad()
            with reducer.no_sync():
                net(batch(comm.rank, 10 + step, torch.float32)).square().mean().backward()
            net(batch(comm.rank, step, torch.float32)).square().mean().backward()
            reducer.finish()
            for part in (10 + step, step):
                losses([batch(rank, part, torch.float64) for rank in range(2)], reference).backward()
            for p, q in zip(net.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-6)
        with pytest.raises(ValueError, match="a second time"):
            for _ in range(2):
                net(batch(comm.rank, 0, torch.float32)).sum().backward()

    ranks(fn, 2)


@pytest.mark.parametrize("change", ["grad.data", "half", "there and back", "transposed"])
def test_a_gradient_that_got_other_memory_is_copied(ranks: Ranks, change: str) -> None:
    """Assigning to `.grad.data`, or model.to(), leaves `.grad` the same object."""

    def fn(comm: Communicator) -> None:
        net = torch.nn.Linear(4, 4)
        reducer = GradientReducer(net.parameters(), comm)
        for step in range(1, 4):
            for i, p in enumerate(net.parameters()):
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                p.grad.fill_(step * (comm.rank + 1))
                reducer.ready(i)
            reducer.finish()
            for p in net.parameters():
                assert (p.grad == 1.5 * step).all() and p.grad.dtype == p.dtype
                if change == "grad.data":
                    p.grad.data = p.grad.data / 2
                elif change == "transposed":
                    p.grad = torch.zeros(p.shape[::-1]).t() if p.ndim == 2 else None
            if change == "half":
                net.half()
            elif change == "there and back":
                net.double().float()

    ranks(fn, 2)


def test_parameters_are_not_lost_over_a_checkpoint_of_late_averages(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        net = torch.nn.Linear(4, 4)
        reducer = GradientReducer(net.parameters(), comm, lag=1, find_unused=True)
        net.weight.grad = torch.full_like(net.weight, comm.rank + 1.0)
        reducer.ready(0)
        assert reducer.finish() is None
        later = GradientReducer(net.parameters(), comm, lag=1, find_unused=True)
        later.load_state_dict(reducer.state_dict())
        assert len(list(later.drain())) == 1
        assert (net.weight.grad == 1.5).all() and net.bias.grad is None

    ranks(fn, 2)


def test_hooks_do_not_keep_the_reducer(ranks: Ranks) -> None:
    """Not even until the garbage collector comes, which would be at another time on each rank."""

    def fn(comm: Communicator) -> None:
        net = model(torch.float32)
        gc.disable()
        try:
            for order in ("ready", "reverse", "priority"):
                reducer = GradientReducer(net.parameters(), comm, order=order)
                reducer.attach()
                net(batch(comm.rank, 0, torch.float32)).sum().backward()  # no hook of the one before
                reducer.finish()
                reducer.zero_grad()
                dropped = weakref.ref(reducer)
                del reducer
                assert dropped() is None
        finally:
            gc.enable()

    ranks(fn, 1)


def test_hooks_of_a_failed_group_leave_backward_alone(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        net = model(torch.float32)
        reducer = GradientReducer(net.parameters(), comm)
        reducer.attach()
        with pytest.raises(pycomm.CommError):
            if comm.rank == 1:
                comm.all_reduce(torch.zeros(1), async_op=True)
            net(batch(comm.rank, 0, torch.float32)).sum().backward()
            reducer.finish()
        net(batch(comm.rank, 0, torch.float32)).sum().backward()
        with pytest.raises(pycomm.AbortedError, match="another GradientReducer"):
            reducer.finish()

    ranks(fn, 2)


def test_gradient_checkpointing_and_shared_parameters(ranks: Ranks) -> None:
    from torch.utils.checkpoint import checkpoint

    def fn(comm: Communicator) -> None:
        for reentrant in (False, True):
            net, reference = model(torch.float32), model()
            shared = alike(torch.nn.Linear(4, 4))
            net.extend([shared, shared])
            reference.extend([copy.deepcopy(shared).double()] * 2)
            reducer = GradientReducer(net.parameters(), comm, bucket_mb=SMALL)
            reducer.attach()
            x = net[0](batch(comm.rank, 0, torch.float32))
            net[3:](checkpoint(net[1:3], x, use_reentrant=reentrant)).square().mean().backward()
            reducer.finish()
            losses([batch(rank, 0, torch.float64) for rank in range(2)], reference).backward()
            for p, q in zip(net.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-6)

    ranks(fn, 2)


def test_channels_last_parameters_are_refused(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        net = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match="'weight' is not contiguous.*contiguous_format"):
            GradientReducer(net.parameters(), comm, names=["weight", "bias"])

    ranks(fn, 1)


@pytest.mark.parametrize("codec", ["int4", "powersgd"])
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_what_nobody_used_is_owed_what_it_was(ranks: Ranks, codec: str, lag: int) -> None:
    """The average of such a gradient is dropped, with what error feedback had put into it."""
    torch = pytest.importorskip("torch")

    def fn(comm: Communicator) -> None:
        given = [torch.nn.Parameter(torch.zeros(24, 24)) for _ in range(3)]
        reducer = GradientReducer(given, comm, codec=codec, error_feedback=True, find_unused=True, lag=lag)
        assert reducer.error_feedback is not None
        reducer.error_feedback.scale = 4.0
        total, want = np.zeros((3, 24, 24)), np.zeros((3, 24, 24))

        def apply(step: int) -> None:
            for i, p in enumerate(given):
                assert (p.grad is None) == (i == (step + 2) % 3)
                if p.grad is not None:
                    total[i] += p.grad.numpy() / 4

        for step in range(7):
            reducer.zero_grad()
            for rank in range(comm.size):
                i = (rank + step) % 3  # of three parameters nobody uses one
                gradient = np.random.default_rng([step, rank]).standard_normal((24, 24)).astype(np.float32)
                want[i] += gradient.astype("d") / comm.size
                if rank == comm.rank:
                    given[i].grad = torch.from_numpy(4 * gradient)
                    reducer.ready(i)
            if reducer.finish() is not None:
                apply(step - lag)
        for step, _ in enumerate(reducer.drain(), 7 - lag):
            apply(step)
        for i in range(3):
            mine = np.asarray(reducer.error_feedback.state_dict()[str(i)])
            left = comm.all_gather(mine).reshape(comm.size, -1).mean(axis=0, dtype="d")
            np.testing.assert_allclose(total[i].ravel() + left, want[i].ravel(), atol=2e-5)

    ranks(fn, 2)
