"""pycomm.torch.compress beside what must come out, in float64: on DistributedDataParallel and fully_shard."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from compressed import SIZE, WAYS, Sums, backward, batch, ddp, fsdp, gradients, net, owed, true_average
from groups import on_ranks
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import pycomm
import pycomm.torch
from pycomm.codecs import ErrorFeedback, Int4, PowerSGD


@pytest.mark.parametrize("way", WAYS)
def test_within_the_bound_and_the_same_on_all_ranks(way: str) -> None:
    """int8 rounds stochastically, by less than a unit: a 127th of a block's largest magnitude, rounded up by
    at most a 256th. First the ranks' gradients are rounded, and then their average."""

    def fn() -> Any:
        model = WAYS[way]()
        compression = pycomm.torch.compress(model, "int8")
        assert compression.error_feedback is None
        found = []
        for step in range(3):
            model.zero_grad()
            backward(model, step)
            want, got = true_average(step), gradients(model)
            assert got.keys() == want.keys()
            everyones = [true_average(step, [rank]) for rank in range(SIZE)]
            for name, exact in want.items():
                error = (got[name] - exact).abs().max()
                if exact.dim() < 2:
                    assert error <= 1e-6, name  # exempt by default
                else:
                    largest = max(each[name].abs().max() for each in everyones)
                    assert 0 < error <= 2 * largest / 127 * (1 + 1 / 256), name
            found.append(got)
        traffic = compression.traffic
        assert 0.2 * traffic.uncompressed < traffic.sent < 0.5 * traffic.uncompressed
        return found

    first, second = on_ranks(fn, SIZE)
    for mine, other in zip(first, second, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("way", WAYS)
def test_exempt_parameters_are_exact(way: str) -> None:
    def fn() -> None:
        for exempt in (["3.*", "0.weight", "*.bias"], lambda name, shape: name != "5.weight"):
            model = WAYS[way]()
            pycomm.torch.compress(model, "int4", exempt=exempt)
            backward(model, 0)
            got, want = gradients(model), true_average(0)
            exact = {name for name in want if torch.allclose(got[name], want[name], rtol=1e-5, atol=1e-7)}
            compressed = {"5.weight"} if callable(exempt) else {"5.weight", "2.weight"}
            assert exact == want.keys() - compressed

    on_ranks(fn, SIZE)


@pytest.mark.parametrize("within", [False, True])
def test_the_rule_of_an_error_feedback_exempts_as_well(within: bool) -> None:
    def fn() -> Any:
        found = []
        for way in WAYS:
            feedback = ErrorFeedback(lambda name, shape: name == "5.weight" or len(shape) < 2)
            given: Any = (Int4(error_feedback=feedback), None) if within else ("int4", feedback)
            model = WAYS[way](torch.nn.Sequential(*list(net())[:5], torch.nn.Linear(30, 8)))
            compression = pycomm.torch.compress(model, given[0], error_feedback=given[1], exempt=["0.weight"])
            backward(model, 0)
            assert compression.state_dict()["residuals"].keys() == {"3.weight"}
            found.append(compression.traffic)
        return found

    of_ddp, of_fsdp2 = on_ranks(fn, SIZE)[0]
    assert of_ddp == of_fsdp2

    def nothing() -> None:
        for way in WAYS:
            with pytest.raises(ValueError, match="leaves none of 8"):
                pycomm.torch.compress(
                    WAYS[way](), "int4", error_feedback=ErrorFeedback(lambda name, shape: True), exempt=[]
                )

    on_ranks(nothing, SIZE)


FED: list[tuple[str, Any]] = [
    ("ddp", "int8"),
    ("ddp", "fp8_e4m3"),
    ("ddp", "sign"),
    ("ddp", "topk"),
    ("ddp", "powersgd"),
    ("fsdp2", "int8"),
    ("fsdp2", "int4"),
    ("fsdp2", "sign"),
]


@pytest.mark.parametrize(("way", "codec"), FED)
def test_what_was_not_sent_is_sent_later(way: str, codec: str) -> None:
    """With a loss scale as well."""

    def fn() -> None:
        for scale in (1.0, 512.0):
            model = WAYS[way]()
            sums = Sums(model, pycomm.torch.compress(model, codec, error_feedback=True), scale)
            for step in range(5):
                sums.step(step)
            sums.check()

    on_ranks(fn, SIZE)


@pytest.mark.parametrize("codec", ["int8", "powersgd"])
def test_residuals_follow_their_parameters_into_other_buckets(codec: str) -> None:
    """DDP fills its buckets anew after the first step, in the order in which gradients came."""

    def fn() -> Any:
        model = ddp(gradient_as_bucket_view=True)
        seen = []
        if codec == "powersgd":
            compressor = PowerSGD(1)
            begin = compressor.begin
            compressor.begin = lambda *call: (seen.append(tuple(call[2])), begin(*call))[1]  # type: ignore
            compression = pycomm.torch.compress(model, compressor)
        else:
            compression = pycomm.torch.compress(model, codec, error_feedback=True)
        sums = Sums(model, compression)
        steps = []
        for step in range(4):
            sums.step(step)
            steps.append(tuple(seen) or tuple(compression._buckets))
            seen.clear()
        sums.check()
        return steps

    first, second, third, _ = on_ranks(fn, SIZE)[0]
    assert first != second == third


def accumulate(way: str, model: Any, step: int) -> None:
    """Two passes a step, of which the last one sends."""
    if way == "ddp":
        with model.no_sync():
            backward(model, 2 * step)
    else:
        model.set_requires_gradient_sync(False)
        backward(model, 2 * step)
        model.set_requires_gradient_sync(True)
    backward(model, 2 * step + 1)


@pytest.mark.parametrize(("way", "codec"), [("ddp", "int8"), ("ddp", "powersgd"), ("fsdp2", "int8")])
def test_gradient_accumulation(way: str, codec: str) -> None:
    def fn() -> None:
        model = WAYS[way]()
        compression = pycomm.torch.compress(model, codec, error_feedback=True)
        sums = Sums(model, compression)
        before = compression.traffic.uncompressed
        for step in range(4):
            model.zero_grad()
            accumulate(way, model, step)
            first, second = true_average(2 * step), true_average(2 * step + 1)
            sums.add({name: first[name] + second[name] for name in first})
        sums.check()
        elements = sum(x.numel() for x in sums.want.values())
        sent = compression.traffic.uncompressed - before
        padding = 4 * 4 * 31 if way == "fsdp2" else 0  # of the row that 7 rows lack
        assert 4 * 4 * elements <= sent <= 4 * 4 * elements + padding  # once a step

    on_ranks(fn, SIZE)


class Branches(torch.nn.Module):
    """Each rank uses one layer in a step, and some layer nobody."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in range(SIZE + 2))
        self.used = 0

    def forward(self, x: Any) -> Any:
        return self.layers[self.used](x)


@pytest.mark.parametrize("codec", ["int4", "powersgd", "sign"])
def test_parameters_that_are_not_used(codec: str) -> None:
    """One that no rank has used has no gradient; what it is owed is paid when it is used again."""

    def fn() -> None:
        model = ddp(Branches(), find_unused_parameters=True)
        compression = pycomm.torch.compress(model, codec, error_feedback=True)
        sums = Sums(model, compression)
        count = len(model.module.layers)
        for step in range(9):
            model.zero_grad()
            model.module.used = (dist.get_rank() + step) % count
            backward(model, step)
            exact: dict[str, Any] = {}
            for rank in range(SIZE):
                whole = Branches()
                whole.used = (rank + step) % count
                for name, grad in true_average(step, [rank], whole).items():
                    exact[name] = exact.get(name, 0) + grad / SIZE
            assert gradients(model).keys() == exact.keys()
            sums.add(exact)
        sums.check()

    on_ranks(fn, SIZE)


def test_parameters_that_ddp_ignores() -> None:
    """It averages those of the outermost module all the same, and so they are compressed."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in range(2))
            self.weight = torch.nn.Parameter(torch.randn(12, 12))

        def forward(self, x: Any) -> Any:
            return self.layers[1](self.layers[0](x)) @ self.weight

    def fn() -> None:
        inner = Scaled()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            inner, ["weight", "layers.0.weight"]
        )
        model = ddp(inner)
        sums = Sums(model, pycomm.torch.compress(model, "sign"))
        for step in range(3):
            model.zero_grad()
            backward(model, step)
            sums.add(true_average(step, model=Scaled()))
        assert owed(sums.compression).keys() == {"weight", "layers.1.weight"}
        sums.check()

    on_ranks(fn, SIZE)


@pytest.mark.parametrize("codec", ["sign", "powersgd"])
def test_what_a_static_graph_does_not_use_is_still_owed(codec: str) -> None:
    """After the state of a run that has used it."""

    def fn() -> None:
        model = ddp(Branches(), find_unused_parameters=True)
        before = pycomm.torch.compress(model, codec)
        for step in range(len(model.module.layers)):
            model.module.used = step
            backward(model, step)
        static = ddp(Branches(), static_graph=True)
        compression = pycomm.torch.compress(static, codec)
        compression.load_state_dict(before.state_dict())
        want = owed(before)
        for step in range(3):
            backward(static, step)
        left = owed(compression)
        for name, residual in want.items():
            assert residual.any()
            assert torch.equal(left[name], residual) == (not name.startswith("layers.0.")), name

    on_ranks(fn, SIZE)


@pytest.mark.parametrize("codec", ["int8", "powersgd"])
def test_a_static_graph_and_uneven_inputs(codec: str) -> None:
    """Under join() a rank that has no more input averages zeros, and pays what it owes."""

    def fn() -> None:
        static = ddp(static_graph=True)
        sums = Sums(static, pycomm.torch.compress(static, codec, error_feedback=True))
        for step in range(4):
            sums.step(step)
        sums.check()
        model = ddp()
        sums = Sums(model, pycomm.torch.compress(model, codec, error_feedback=True))
        with Join([model]):
            for step in range(3 + 2 * dist.get_rank()):
                model.zero_grad()
                backward(model, step)
                if dist.get_rank() == 1:
                    alone = step >= 3
                    exact = true_average(step, [1] if alone else range(SIZE))
                    sums.add({name: grad / (SIZE if alone else 1) for name, grad in exact.items()})
        left = owed(sums.compression)
        for name, residual in left.items() if dist.get_rank() == 1 else ():
            paid = sums.got[name].reshape(-1) + residual
            torch.testing.assert_close(paid, sums.want[name].reshape(-1), rtol=0, atol=2e-6)

    on_ranks(fn, SIZE)


def test_a_module_of_which_a_part_is_not_used() -> None:
    """fully_shard reduces what has a gradient: uncompressed, as nothing says which parameters these are."""

    def fn() -> None:
        class Half(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.a, self.b = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)
                self.whole = True

            def forward(self, x: Any) -> Any:
                return self.a(x) + self.b(x) if self.whole else self.a(x)

        model = fully_shard(Half())
        compression = pycomm.torch.compress(model, "int4", error_feedback=True)
        sums = Sums(model, compression)
        for step in range(5):
            model.zero_grad()
            model.whole = step % 2 == 0
            backward(model, step)
            whole = Half()
            whole.whole = model.whole
            exact = true_average(step, model=whole)
            got = gradients(model)
            assert got.keys() == exact.keys() and len(exact) == (4 if model.whole else 2)
            near = all(torch.allclose(got[name], exact[name], atol=1e-6) for name in exact)
            assert near == (not model.whole)
            sums.add(exact)
        sums.check()

    on_ranks(fn, SIZE)


def test_frozen_parameters_have_no_part() -> None:
    """The others of their module are compressed, whatever the frozen ones' dtype."""

    class Adapted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.base = torch.nn.Linear(12, 30, bias=False)
            self.base.requires_grad_(False)
            self.table = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float64), requires_grad=False)
            self.down = torch.nn.Linear(12, 16, bias=False)
            self.up = torch.nn.Linear(16, 30, bias=False)

        def forward(self, x: Any) -> Any:
            return self.base(x) + self.up(self.down(x))

    def fn() -> None:
        sharded, whole = Adapted(), Adapted()
        for layer in (sharded.base, sharded.down, sharded.up):
            fully_shard(layer)
        del whole.table  # FSDP2 takes one dtype a module
        for model in (ddp(Adapted()), fully_shard(sharded), fully_shard(whole)):
            compression = pycomm.torch.compress(model, "sign")
            sums = Sums(model, compression)
            for step in range(3):
                model.zero_grad()
                backward(model, step)
                sums.add(true_average(step, model=Adapted()))
            sums.check()
            assert compression.traffic.sent < 0.2 * compression.traffic.uncompressed

    on_ranks(fn, SIZE)


@pytest.mark.parametrize("codec", ["int4", "powersgd"])
@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_half_precision_in_ddp(kind: str, codec: str) -> None:
    """A bfloat16 model, whose gradients are bfloat16, and autocast, under which they are float32."""

    def fn() -> None:
        model = ddp(net().bfloat16() if kind == "bfloat16" else net())
        compression = pycomm.torch.compress(model, codec, error_feedback=True)
        # bfloat16 has 8 bits: a result is rounded by at most a 256th of it.
        sums = Sums(model, compression, rounding=1 / 256 if kind == "bfloat16" else 0.0)

        def backward(step: int) -> None:
            model.zero_grad()
            x = batch(step).bfloat16() if kind == "bfloat16" else batch(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                loss = model(x).square().mean()
            loss.backward()

        for step in range(4):
            with model.no_sync():
                backward(step)
            exact = {name: grad / SIZE for name, grad in gradients(model).items()}
            for grad in exact.values():
                dist.all_reduce(grad)
            backward(step)
            sums.add(exact)
        sums.check()

    on_ranks(fn, SIZE)


@pytest.mark.parametrize("reduced", [torch.float32, torch.bfloat16])
def test_mixed_precision_in_fsdp2(reduced: Any) -> None:
    """bfloat16 in the passes; gradients cross as float32 or bfloat16."""

    def fn() -> None:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduced)
        model, plain = fsdp(mp_policy=policy), fsdp(mp_policy=policy)
        rounding = 1 / 256 if reduced == torch.bfloat16 else 0.0  # of both models
        sums = Sums(model, pycomm.torch.compress(model, "int4", error_feedback=True), rounding=rounding)
        for step in range(4):
            for each in (model, plain):
                each.zero_grad()
                backward(each, step)
            sums.add(gradients(plain))
        sums.check()

    on_ranks(fn, SIZE)


def test_hybrid_shards() -> None:
    """Two replicas of two shards: the reduce_scatter within a replica is compressed."""

    def fn() -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        model = fsdp(mesh=mesh)
        sums = Sums(model, pycomm.torch.compress(model, "int8", error_feedback=True), ranks=4)
        for step in range(3):
            sums.step(step)
        sums.check()

    on_ranks(fn, 4)


def test_shards_of_columns_and_another_divisor() -> None:
    """shard_placement_fn, and set_gradient_divide_factor, of which FSDP2 makes another operator."""

    def fn() -> None:
        model = torch.nn.Sequential(net()[0], net()[3])
        for layer in model:
            fully_shard(layer, shard_placement_fn=lambda p: Shard(p.dim() - 1))
            layer.set_gradient_divide_factor(1.0)
        fully_shard(model)
        sums = Sums(model, pycomm.torch.compress(model, "int8", error_feedback=True))
        for step in range(3):
            model.zero_grad()
            backward(model, step)
            plain = true_average(step, model=torch.nn.Sequential(net()[0], net()[3]))
            sums.add({name: grad * SIZE for name, grad in plain.items()})
        for name in sums.want:  # the residual is of gradients, and the result is their sum
            sums.got[name] /= SIZE
            sums.want[name] /= SIZE
        sums.check()

    on_ranks(fn, SIZE)
