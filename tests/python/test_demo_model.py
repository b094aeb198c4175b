"""The demo's model, its optimizer and its split of the data (examples/lm)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from lm.data import VOCABULARY, rank_batch, read_text, split_text
from lm.model import Adam, Model, Shape

TINY = Shape(vocabulary=7, context=3, embedding=2, hidden=5)


def tiny_model(seed: int = 0) -> Model:
    n = TINY.count()
    return Model(TINY, np.empty(n), np.full(n, np.nan), seed=seed)  # float64; every gradient must be written


def tiny_batch(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(7, size=(rows, 3)), rng.integers(7, size=rows)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradient_is_that_of_finite_differences(seed: int) -> None:
    model, (x, y) = tiny_model(seed), tiny_batch(11, seed)
    model.params += 0.01  # moves biases away from zero, the kink of relu
    model.backward(x, y)
    step = 1e-6
    measured = np.empty_like(model.params)
    for i, value in enumerate(model.params.copy()):
        model.params[i] = value + step
        above = model.loss(x, y)
        model.params[i] = value - step
        measured[i] = (above - model.loss(x, y)) / (2 * step)
        model.params[i] = value
    np.testing.assert_allclose(model.grads, measured, rtol=1e-5, atol=1e-8)
    assert np.abs(measured).max() > 1e-3


def test_a_gradient_is_final_when_backward_says_so() -> None:
    model, (x, y) = tiny_model(), tiny_batch(11)
    gradients, said = TINY.views(model.grads), {}
    model.backward(x, y, lambda *names: said.update({name: gradients[name].copy() for name in names}))
    assert list(said) == ["b3", "W3", "b2", "W2", "b1", "W1", "embed"]  # the last layer's first
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(said[name], gradient)


def test_first_loss_is_that_of_guessing() -> None:
    model = Model(Shape(VOCABULARY, hidden=64), *np.empty((2, Shape(VOCABULARY, hidden=64).count())), seed=0)
    x, y = rank_batch(read_text(), 16, 256, seed=0, step=0)
    assert model.loss(x, y) == pytest.approx(np.log(VOCABULARY), rel=0.05)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_average_of_the_ranks_gradients_is_that_of_the_batch(size: int) -> None:
    model, (x, y) = tiny_model(), tiny_batch(12)
    loss = model.backward(x, y)
    whole = model.grads.copy()
    rows = 12 // size
    losses, parts = [], []
    for rank in range(size):
        mine = slice(rank * rows, (rank + 1) * rows)
        losses.append(model.backward(x[mine], y[mine]))
        parts.append(model.grads.copy())
    assert np.mean(losses) == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(np.mean(parts, axis=0), whole, rtol=1e-10, atol=1e-14)


def test_adam_is_that_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adam, "BLOCK", 4)  # several blocks, the last one short
    rng = np.random.default_rng(0)
    params, grads = rng.standard_normal(10), np.empty(10)
    theta, m, v = params.copy(), 0.0, 0.0
    adam = Adam(params, grads)
    for t in range(1, 6):
        grads[:] = rng.standard_normal(10)
        adam.step(0.1)
        m = 0.9 * m + 0.1 * grads
        v = 0.99 * v + 0.01 * grads**2
        theta = theta - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
    np.testing.assert_allclose(params, theta, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_ranks_batches_together_are_the_global_batch(size: int) -> None:
    text, _ = split_text(read_text())
    x, y = rank_batch(text, 16, 96, seed=5, step=3)
    shares = [rank_batch(text, 16, 96, seed=5, step=3, rank=rank, size=size) for rank in range(size)]
    assert {len(share_y) for _, share_y in shares} == {96 // size}
    np.testing.assert_array_equal(np.concatenate([share_x for share_x, _ in shares]), x)
    np.testing.assert_array_equal(np.concatenate([share_y for _, share_y in shares]), y)


def test_batches_differ_by_step_and_seed() -> None:
    text = read_text()
    batches = [rank_batch(text, 16, 8, seed=s, step=t)[0].tobytes() for s in (0, 1) for t in (0, 1)]
    assert len(set(batches)) == 4


def test_a_row_and_what_follows_it_stand_in_the_text() -> None:
    text = read_text()
    x, y = rank_batch(text, 16, 4, seed=0, step=0)
    for row, follows in zip(x, y, strict=True):
        assert row.tobytes() + bytes([follows]) in text.tobytes()


def test_a_batch_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"10 rows .* 3 ranks"):
        rank_batch(read_text(), 16, 10, seed=0, step=0, rank=0, size=3)


def test_the_text_is_large_and_ascii_and_split_without_overlap() -> None:
    text = read_text()
    assert len(text) > 2_000_000
    assert text.max() < VOCABULARY
    train, held_out = split_text(text)
    assert len(held_out) > 100_000
    np.testing.assert_array_equal(np.concatenate([train, held_out]), text)


def test_the_demo_trains_a_million_parameters() -> None:
    assert Shape(VOCABULARY).count() >= 1_000_000
