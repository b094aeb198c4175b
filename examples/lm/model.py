"""A neural probabilistic language model (Bengio et al., 2003) over bytes, in NumPy, with Adam.

The last `context` bytes are embedded, concatenated and sent through two hidden layers (the second with a
residual connection) to the logits of the next byte:

    h1 = relu(embed(x) W1 + b1)        h2 = h1 + relu(h1 W2 + b2)        logits = h2 W3 + b3

All parameters are views into one flat vector, and all gradients are views into another. So backward writes
directly into the caller's memory for the gradients, such as symmetric memory, from which other ranks can read
without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Tokens = NDArray[np.integer]


@dataclass(frozen=True)
class Shape:
    vocabulary: int
    context: int = 16
    embedding: int = 32
    hidden: int = 768

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of the flat vector."""
        joined = self.context * self.embedding
        return {
            "embed": (self.vocabulary, self.embedding),
            "W1": (joined, self.hidden),
            "b1": (self.hidden,),
            "W2": (self.hidden, self.hidden),
            "b2": (self.hidden,),
            "W3": (self.hidden, self.vocabulary),
            "b3": (self.vocabulary,),
        }

    def count(self) -> int:
        return sum(math.prod(shape) for shape in self.parameters().values())

    def views(self, flat: Array) -> dict[str, Array]:
        """Views of the flat vector, one for each parameter."""
        views, start = {}, 0
        for name, shape in self.parameters().items():
            end = start + math.prod(shape)
            views[name] = flat[start:end].reshape(shape)
            start = end
        return views


class Model:
    """`params` is filled from `seed`, `grads` is written by `backward`; both hold shape.count() elements."""

    def __init__(self, shape: Shape, params: Array, grads: Array, *, seed: int) -> None:
        self.shape, self.params, self.grads = shape, params, grads
        self._p, self._g = shape.views(params), shape.views(grads)
        self._one_hot = np.eye(shape.vocabulary, dtype=params.dtype)
        rng = np.random.default_rng(seed)
        params.fill(0)
        for name, gain in {"embed": 1.0, "W1": math.sqrt(2), "W2": math.sqrt(2), "W3": 0.1}.items():
            fan_in = 1 if name == "embed" else self._p[name].shape[0]
            self._p[name][:] = rng.standard_normal(self._p[name].shape) * gain / math.sqrt(fan_in)

    def loss(self, x: Tokens, y: Tokens) -> float:
        """Mean cross-entropy in nats per byte."""
        return _cross_entropy(self._forward(x)[-1], y)[0]

    def backward(self, x: Tokens, y: Tokens, final: Callable[..., None] = lambda *names: None) -> float:
        """Returns the loss; writes its gradient to `grads`, and calls `final` with the names of parameters as
        soon as their gradients are there."""
        p, g = self._p, self._g
        e, h1, h2, logits = self._forward(x)
        loss, d = _cross_entropy(logits, y)
        np.matmul(h2.T, d, out=g["W3"])
        d.sum(axis=0, out=g["b3"])
        final("b3", "W3")
        d_h1 = d @ p["W3"].T  # the gradient of h2 and, through the residual connection, of h1
        d = d_h1 * (h2 > h1)
        np.matmul(h1.T, d, out=g["W2"])
        d.sum(axis=0, out=g["b2"])
        final("b2", "W2")
        d_h1 += d @ p["W2"].T
        d_h1 *= h1 > 0
        np.matmul(e.T, d_h1, out=g["W1"])
        d_h1.sum(axis=0, out=g["b1"])
        final("b1", "W1")
        d_e = (d_h1 @ p["W1"].T).reshape(-1, self.shape.embedding)
        # Sums rows by token, as a product with one-hot rows: a GEMM is far faster than np.add.at.
        np.matmul(self._one_hot[x.ravel()].T, d_e, out=g["embed"])
        final("embed")
        return loss

    def sample(self, prompt: bytes, *, length: int, temperature: float, seed: int) -> bytes:
        """`prompt`, of at least `context` bytes, and `length` bytes drawn from the model after it."""
        rng = np.random.default_rng(seed)
        text = bytearray(prompt)
        for _ in range(length):
            context = np.frombuffer(text[-self.shape.context :], np.uint8)
            logits = self._forward(context[np.newaxis])[-1][0]
            # The largest of logits with Gumbel noise is a draw from their softmax.
            text.append(int(np.argmax(logits / temperature + rng.gumbel(size=logits.size))))
        return bytes(text)

    def _forward(self, x: Tokens) -> tuple[Array, Array, Array, Array]:
        p = self._p
        e = p["embed"][x].reshape(len(x), -1)
        h1 = _relu(e @ p["W1"] + p["b1"])
        h2 = h1 + _relu(h1 @ p["W2"] + p["b2"])
        return e, h1, h2, h2 @ p["W3"] + p["b3"]


def _relu(x: Array) -> Array:
    return np.maximum(x, 0, out=x)


def _cross_entropy(logits: Array, y: Tokens) -> tuple[float, Array]:
    """(mean loss, its gradient by the logits)."""
    rows = np.arange(len(y))
    logits = logits - logits.max(axis=1, keepdims=True)
    d = np.exp(logits)
    total = d.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log(total[:, 0]) - logits[rows, y]))
    d /= total
    d[rows, y] -= 1
    d /= len(y)
    return loss, d


class Adam:
    """Adam (Kingma and Ba, 2014), in blocks that stay in cache: the update is then one pass over memory."""

    BLOCK = 1 << 15

    def __init__(self, params: Array, grads: Array, *, beta1: float = 0.9, beta2: float = 0.99) -> None:
        self.params, self.grads = params, grads
        self.beta1, self.beta2 = beta1, beta2
        self.m, self.v = np.zeros_like(params), np.zeros_like(params)
        self.steps = 0

    def step(self, rate: float) -> None:
        self.steps += 1
        rate /= 1 - self.beta1**self.steps
        unbias = 1 / (1 - self.beta2**self.steps)
        for start in range(0, len(self.params), self.BLOCK):
            block = slice(start, start + self.BLOCK)
            p, g, m, v = self.params[block], self.grads[block], self.m[block], self.v[block]
            m += (1 - self.beta1) * (g - m)
            v += (1 - self.beta2) * (g * g - v)
            p -= rate * m / (np.sqrt(unbias * v) + 1e-8)
