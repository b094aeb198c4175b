"""Trains a small network with JAX, data parallel on all ranks and on one: the losses are equal to rounding.

    pycomm run -n 2 examples/jax_data_parallel.py

Each rank computes the gradient on its own rows, and the compiled step averages them. Needs JAX:
`pip install jax`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import pycomm
from pycomm.jax import all_reduce, broadcast

ROWS, FEATURES, HIDDEN, STEPS, RATE = 240, 8, 32, 200, 0.1


def initial(key):
    one, two = jax.random.split(key)
    return {
        "w1": jax.random.normal(one, (FEATURES, HIDDEN)) / FEATURES**0.5,
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(two, (HIDDEN,)) / HIDDEN**0.5,
        "b2": jnp.zeros(()),
    }


def loss(parameters, x, y):
    hidden = jnp.tanh(x @ parameters["w1"] + parameters["b1"])
    return ((hidden @ parameters["w2"] + parameters["b2"] - y) ** 2).mean()


@partial(jax.jit, static_argnames="comm")
def step(parameters, x, y, comm):
    flat, unflatten = ravel_pytree(jax.value_and_grad(loss)(parameters, x, y))
    value, gradients = unflatten(all_reduce(flat, comm, "avg"))  # one call for the loss and all gradients
    return value, jax.tree.map(lambda p, g: p - RATE * g, parameters, gradients)


def train(comm):
    """Returns the loss at every 50th step, which does not depend on how many ranks share the rows."""
    x = jax.random.normal(jax.random.key(0), (ROWS, FEATURES))
    y = jnp.sin(x[:, 0]) + x[:, 1] * x[:, 2] / 2
    rows = slice(comm.rank * ROWS // comm.size, (comm.rank + 1) * ROWS // comm.size)
    flat, unflatten = ravel_pytree(initial(jax.random.key(comm.rank)))
    parameters = unflatten(broadcast(flat, comm))  # rank 0's, on all ranks
    losses = []
    for i in range(STEPS + 1):
        value, parameters = step(parameters, x[rows], y[rows], comm)
        if i % 50 == 0:
            losses.append(float(value))
    return losses


comm = pycomm.init()
if ROWS % comm.size:
    raise SystemExit(f"{ROWS} rows do not divide by {comm.size} ranks")
together, alone = train(comm), train(comm.split(color=comm.rank))
if comm.rank == 0:
    for i, (many, one) in enumerate(zip(together, alone, strict=True)):
        print(f"step {50 * i:3}: loss {many:.6f} on {comm.size} ranks, {one:.6f} on one")
jax.effects_barrier()  # what is compiled may still be on its way: it ends before the group does
comm.close()
