"""Buckets of torch's parameters and gradients, which zero_grad() replaces."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pycomm
from pycomm import Bucket, Communicator

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # a child of fork has no other threads of torch's pool

Ranks = Callable[..., list[Any]]


def model_of() -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    generator = torch.Generator().manual_seed(0)  # rank threads share torch's default generator
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


def backward(model: Any, seed: int) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()


@pytest.mark.parametrize("made", ["before", "after", "in the buffer"])
def test_replicas_stay_equal_under_zero_grad(ranks: Ranks, made: str) -> None:
    """The usual loop, with the default zero_grad(), which drops the gradients."""

    def fn(comm: Communicator) -> Any:
        models = [model_of(), model_of()]
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in models]
        model, alone = models  # the second sees the data of both ranks
        bucket = Bucket(model.parameters(), comm=comm) if made != "after" else None
        for step in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            if made == "in the buffer" and step % 2:
                assert bucket is not None
                bucket.data.zero_()
                for parameter, view in zip(model.parameters(), bucket.views, strict=True):
                    parameter.grad = view
            backward(model, 10 * step + comm.rank)
            for rank in range(comm.size):
                backward(alone, 10 * step + rank)
            bucket = bucket or Bucket(model.parameters(), comm=comm)
            bucket.pack()
            comm.all_reduce(bucket)
            bucket.unpack()
            for optimizer in optimizers:
                optimizer.step()
        for got, want in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(got, want)
        return [parameter.tolist() for parameter in model.parameters()]

    first, second = ranks(fn, 2)
    assert first == second


def test_values_are_not_taken_for_gradients() -> None:
    model = model_of()
    values = [parameter.detach().clone() for parameter in model.parameters()]
    leaf = torch.ones(3, requires_grad=True)
    bucket = Bucket([*model.parameters(), leaf])
    assert bucket.tensors[-1] is leaf
    backward(model, 1)
    leaf.sum().backward()
    bucket.pack(2)
    for view, parameter in zip(bucket.views, bucket.tensors, strict=True):
        assert torch.equal(view, 2 * parameter.grad)
    bucket.data.fill_(7)
    bucket.unpack()
    for parameter, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(parameter, value) and (parameter.grad == 7).all()
    bucket = Bucket([parameter.detach() for parameter in model.parameters()])
    bucket.pack()
    assert all(torch.equal(view, value) for view, value in zip(bucket.views, values, strict=True))


def test_gradients_that_are_missing() -> None:
    model = model_of()
    names = [name for name, _ in model.named_parameters()]
    for bucket, words in (
        (Bucket(model.parameters(), names=names), r"None: '0.weight', '0.bias', '1.weight' \(and 1 more\)"),
        (Bucket(model.parameters()), r"None: `tensors\[0\]`, .*missing_as_zero=True"),
    ):
        for call in (bucket.pack, bucket.unpack, bucket.check_unpack):
            with pytest.raises(ValueError, match=words):
                call()
    model[0](torch.ones(1, 4)).sum().backward()
    with pytest.raises(ValueError, match="None: '1.weight', '1.bias'; pack after"):
        Bucket(model.parameters(), names=names).pack()
    assert model[1].weight.grad is None
    bucket = Bucket(model.parameters(), names=names, missing_as_zero=True)
    bucket.data.fill_(5)
    assert bucket.pack().sum_squares == sum(float(p.grad.square().sum()) for p in model[0].parameters())
    assert not model[1].weight.grad.any()
    model.zero_grad()
    bucket.data.fill_(3)
    bucket.unpack()
    assert all((parameter.grad == 3).all() for parameter in model.parameters())


def test_frozen_parameters_are_refused() -> None:
    """Else their values would be reduced as gradients, or an optimizer that sees zeros would decay them."""
    model = model_of()
    model[0].bias.requires_grad_(False)
    for missing_as_zero in (False, True):
        with pytest.raises(ValueError, match=r"requires_grad=False.*: `tensors\[1\]`; leave it out"):
            Bucket(model.parameters(), missing_as_zero=missing_as_zero)
    backward(model, 1)
    bucket = Bucket([p for p in model.parameters() if p.requires_grad], missing_as_zero=True)
    bucket.pack()
    model[0].weight.requires_grad_(False)
    model.zero_grad()
    with pytest.raises(ValueError, match=r"requires_grad=False.*: `tensors\[0\]`"):
        bucket.pack()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kept", [False, True])
def test_gradients_that_a_parameter_has_dropped_are_refused(kept: bool) -> None:
    model = model_of()
    backward(model, 1)
    gradients = [parameter.grad for parameter in model.parameters()]
    bucket = Bucket(gradients, names=list("abcd"))
    if not kept:
        del gradients
    for set_to_none in (False, False, True):
        bucket.pack()
        bucket.unpack()
        model.zero_grad(set_to_none=set_to_none)
    for again in (False, True):  # before backward(), and after it
        if again:
            backward(model, 2)
        for call in (bucket.pack, bucket.unpack, bucket.check_unpack):
            some = r"no longer a parameter's gradient: 'a', 'b', 'c' \(and 1 more\)"
            with pytest.raises(ValueError, match=rf"{some}.*Bucket\(model.par"):
                call()
    bucket.tensors = [parameter.grad for parameter in model.parameters()]
    bucket.pack()
    model[1].bias.grad = None
    with pytest.raises(ValueError, match="no longer a parameter's gradient: 'd'; zero_grad"):
        bucket.pack()
    bucket.tensors = bucket.tensors  # the caller confirms them
    bucket.pack()


def test_views_that_a_parameter_has_dropped_are_refused() -> None:
    """The bucket got the views before the parameters did."""
    model = model_of()
    bucket = Bucket([parameter.detach() for parameter in model.parameters()])
    bucket.tensors = bucket.views
    for parameter, view in zip(model.parameters(), bucket.views, strict=True):
        parameter.grad = view
    backward(model, 1)
    bucket.pack()
    model.zero_grad()
    backward(model, 2)
    with pytest.raises(ValueError, match=r"no longer a parameter's gradient: `tensors\[0\]`"):
        bucket.pack()


def test_tensors_that_no_parameter_holds_are_taken_as_they_are() -> None:
    flat = torch.ones(10)
    bucket = Bucket([flat[:4], flat[4:], torch.zeros(3), torch.from_numpy(flat.numpy())])
    del flat
    for _ in range(2):
        assert bucket.pack().sum_squares == 20


@pytest.mark.parametrize("codec", [None, "bf16"])
def test_lists_hold_what_is_in_them(ranks: Ranks, codec: str | None) -> None:
    """A list of parameters holds their values, with a codec, too. Gradients may be dropped meanwhile."""

    def fn(comm: Communicator) -> None:
        parameters = [
            torch.full((3,), comm.rank + 1.0, requires_grad=True),
            torch.nn.Parameter(torch.ones(2)),
        ]
        parameters[1].requires_grad_(False)
        assert comm.all_reduce(parameters, codec=codec) is parameters
        assert parameters[0].tolist() == [3] * 3 and parameters[1].tolist() == [2] * 2
        model = model_of()
        backward(model, 1)
        gradients = [parameter.grad for parameter in model.parameters()]
        want = [2 * gradient for gradient in gradients]
        work = comm.all_reduce(gradients, codec=codec, async_op=True)
        model.zero_grad()
        work.wait()
        for got, expected in zip(gradients, want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0.01, atol=0)

    ranks(fn, 2)


def test_error_feedback_goes_by_name(ranks: Ranks) -> None:
    """It keeps no tensor: replaced gradients get the residuals of those before them."""

    def fn(comm: Communicator) -> None:
        feedback = pycomm.codecs.ErrorFeedback()
        codec = pycomm.codecs.Int4(error_feedback=feedback)
        model = model_of()
        names = [name for name, _ in model.named_parameters()]
        bucket = Bucket(model.parameters(), names=names)
        total, exact = torch.zeros(3, 4), torch.zeros(3, 4)
        for step in range(5):
            model.zero_grad()
            backward(model, 10 * step + comm.rank)
            exact += model[0].weight.grad / comm.size
            bucket.pack()
            comm.all_reduce(bucket, op="avg", codec=codec)
            bucket.unpack()
            total += model[0].weight.grad
        owed = torch.as_tensor(feedback.state_dict()["0.weight"]).reshape(3, 4) / comm.size
        comm.all_reduce([exact, owed])
        torch.testing.assert_close(total + owed, exact, rtol=0, atol=1e-4)

    ranks(fn, 2)


@pytest.mark.parametrize("how", ["bucket", "tag"])
def test_states_survive_torch_save(tmp_path: Path, how: str) -> None:
    """With torch.load's defaults, which read no arrays; and with savez and pickle."""

    def fn(comm: Communicator) -> None:
        feedback = pycomm.codecs.ErrorFeedback()
        codec = pycomm.codecs.Int4(error_feedback=feedback)
        x = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
        bucket = Bucket([x], names=["w"])
        bucket.pack()
        comm.all_reduce(bucket if how == "bucket" else x, codec=codec, tag="w")
        state = feedback.state_dict()
        assert state["w"].any() and state["w"].shape == (600,)
        path = tmp_path / f"of rank {comm.rank}"
        torch.save({"feedback": state}, path.with_suffix(".pt"))
        np.savez(path.with_suffix(".npz"), **state)
        for found in (
            torch.load(path.with_suffix(".pt"))["feedback"],
            torch.load(path.with_suffix(".pt"), mmap=True)["feedback"],
            {name: residual.requires_grad_() for name, residual in pickle.loads(pickle.dumps(state)).items()},
            np.load(path.with_suffix(".npz")),
        ):
            again = pycomm.codecs.ErrorFeedback()
            again.load_state_dict(found)
            loaded = again.state_dict()
            assert isinstance(loaded["w"], torch.Tensor) == (not hasattr(found, "files"))
            assert (np.asarray(loaded["w"]) == np.asarray(state["w"])).all()
        with pytest.raises(ValueError, match="'w' is not a 1-D array"):
            again.load_state_dict({"w": x})
        again.load_state_dict([state, state])
        assert torch.equal(again.state_dict()["w"], state["w"])

    pycomm.run_local(fn, 2)
