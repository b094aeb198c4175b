"""Collectives on JAX's CPU arrays: inside of jax.jit and outside, differentiable, in the program's order.

Each is one primitive of JAX's, whose compiled code calls back into Python. docs/jax.md says how to use them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pycomm import checks
from pycomm.group import Communicator

try:
    import jax
    import jax.numpy as jnp
    from jax.core import ShapedArray
    from jax.experimental import io_callback
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir
except ImportError as error:
    raise ImportError(f"pycomm.jax needs JAX, 0.7 or later: `pip install jax` ({error})") from error

__all__ = ["all_gather", "all_reduce", "all_to_all", "broadcast", "reduce_scatter"]

# Derivatives are those of one function of all ranks' inputs, the sum of what the ranks differentiate: so the
# transpose of a collective is a collective.
_TRANSPOSED = {
    "all_reduce": "all_reduce",
    "all_gather": "reduce_scatter",
    "reduce_scatter": "all_gather",
    "all_to_all": "all_to_all",
    "broadcast": "reduce",
    "reduce": "broadcast",
}
_ELEMENTWISE = {"all_reduce", "broadcast", "reduce"}  # of any shape; the others cut or join parts on axis 0
_REDUCTIONS = {"all_reduce", "reduce_scatter", "reduce"}


@dataclass(frozen=True)
class _Call:
    """A collective with its arguments but `x`. JAX compiles once for calls that are equal; two communicators
    never are."""

    comm: Communicator
    collective: str
    op: str = "sum"
    root: int = 0

    def shape(self, x: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the result."""
        if self.collective == "all_gather":
            return (x[0] * self.comm.size, *x[1:])
        if self.collective == "reduce_scatter":
            return (x[0] // self.comm.size, *x[1:])
        return x

    def transposed(self) -> _Call:
        """Without the factor of an average, unless it is an average itself."""
        op = self.op if self.collective == "all_reduce" else "sum"
        return replace(self, collective=_TRANSPOSED[self.collective], op=op)

    def run(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`x` is XLA's own memory, to be read only."""
        options: dict[str, Any] = {}
        if self.collective in _REDUCTIONS:
            options["op"] = self.op
        if self.collective in ("broadcast", "reduce"):
            options["root"] = self.root
        if self.collective == "reduce" and self.comm.rank != self.root:
            self.comm.reduce(x, **options)
            return np.zeros_like(x)
        out = np.empty(self.shape(x.shape), x.dtype)
        getattr(self.comm, self.collective)(x, out=out, **options)
        return out


def all_reduce(x: jax.typing.ArrayLike, comm: Communicator, op: str = "sum") -> jax.Array:
    """Combines `x` of all ranks element by element; every rank gets the result.

    `op` is an operator of Communicator.all_reduce. "sum" and "avg" can be differentiated; the others raise
    NotImplementedError where a derivative is asked for.

    Raises TypeError for what is no Communicator, and for a dtype that `op` does not take; ValueError for an
    unknown `op`, and for ranks that are threads of one process (run_local); NotImplementedError for programs
    of several devices or of other devices than CPUs. All of these come while JAX traces or compiles, before
    this rank has moved. Errors of a call that runs are a jax.errors.JaxRuntimeError, whose text ends with
    pycomm's error (docs/jax.md).
    """
    return _bind(x, _Call(comm, "all_reduce", op))


def all_gather(x: jax.typing.ArrayLike, comm: Communicator) -> jax.Array:
    """The `x` of all ranks, of one shape, concatenated on axis 0 in rank order. Errors as all_reduce."""
    return _bind(x, _Call(comm, "all_gather"))


def reduce_scatter(x: jax.typing.ArrayLike, comm: Communicator, op: str = "sum") -> jax.Array:
    """Combines `x` of all ranks and returns this rank's part: rows / ranks of them, on axis 0.

    Raises ValueError for rows that do not divide by the ranks. Other errors as all_reduce.
    """
    return _bind(x, _Call(comm, "reduce_scatter", op))


def all_to_all(x: jax.typing.ArrayLike, comm: Communicator) -> jax.Array:
    """Sends part r of `x`, of equal parts along axis 0, to rank r; returns the parts from all ranks, in rank
    order. Errors as reduce_scatter."""
    return _bind(x, _Call(comm, "all_to_all"))


def broadcast(x: jax.typing.ArrayLike, comm: Communicator, root: int = 0) -> jax.Array:
    """Rank `root`'s `x`, on every rank; the others' `x` has its shape and dtype. Errors as all_reduce."""
    return _bind(x, _Call(comm, "broadcast", root=checks.integer(root, "root")))


def _bind(x: Any, call: _Call) -> Any:
    comm = call.comm
    if not isinstance(comm, Communicator):
        raise TypeError(f"`comm` is {checks.shown(comm)}: pass a Communicator, as pycomm.init() returns it")
    if comm._in_threads and comm.size > 1:
        # Their calls would wait for each other on the few threads that JAX runs a process's programs on.
        raise ValueError(
            "ranks that are threads of one process (run_local) would wait for each other forever inside of"
            " JAX: make them processes, with `pycomm run -n 2 script.py`"
        )
    if not 0 <= call.root < comm.size:
        raise ValueError(f"`root` is {call.root}: ranks of this group are 0 to {comm.size - 1}")
    x = jnp.asarray(x)
    # Refuses operators and dtypes that the call would refuse.
    comm.explain(call.collective, 0, x.dtype.name, op=call.op)
    if call.collective not in _ELEMENTWISE:
        if x.ndim == 0:
            raise ValueError(f"{call.collective} of a number: pass an array with an axis 0, x.reshape(1)")
        if call.collective != "all_gather" and x.shape[0] % comm.size:
            raise ValueError(
                f"{call.collective} of {x.shape[0]} rows on {comm.size} ranks: pass rows that divide by the"
                " ranks, padded if need be"
            )
    return _collective.bind(x, call=call)


_collective = Primitive("pycomm")
_compiled = jax.jit(_collective.bind, static_argnames="call")


def _outside_of_jit(x: Any, *, call: _Call) -> Any:
    """A compiled program as well, and so in order with those that are still on their way."""
    with jax.disable_jit(False):
        return _compiled(x, call=call)


_collective.def_impl(_outside_of_jit)

# The effect of ordered io_callbacks: JAX runs what has it in the program's order, and drops none of it. Our
# callback is not an io_callback, which first hands its arguments to JAX again, as jax.Arrays: where a process
# has one core, it then waits for the thread that it runs on.
_ORDERED = jax.make_jaxpr(lambda: io_callback(lambda: None, None, ordered=True))().effects


def _result(x: Any, *, call: _Call) -> tuple[Any, Any]:
    return ShapedArray(call.shape(x.shape), x.dtype), _ORDERED


_collective.def_effectful_abstract_eval(_result)


def _lower(context: Any, x: Any, *, call: _Call) -> Any:
    axes = context.module_context.axis_context
    devices = axes.mesh.size if isinstance(axes, mlir.SPMDAxisContext) else axes.num_devices
    if devices != 1:
        raise NotImplementedError(
            f"pycomm.jax.{call.collective} in a program of {devices} devices (pmap, shard_map, a sharded"
            " array): a rank has one device; start a rank for each with `pycomm run`"
        )
    (effect,) = _ORDERED
    results, token, _ = mlir.emit_python_callback(
        context,
        lambda x: (call.run(x),),
        context.tokens_in.get(effect),
        [x],
        context.avals_in,
        context.avals_out,
        has_side_effect=True,
    )
    context.set_tokens_out(context.tokens_in.update_tokens(mlir.TokenSet({effect: token})))
    return results


def _refuse(context: Any, x: Any, *, call: _Call) -> Any:
    raise NotImplementedError(
        f"pycomm.jax.{call.collective} takes CPU arrays: start the program with JAX_PLATFORMS=cpu, or move"
        ' `x` with jax.device_put(x, jax.devices("cpu")[0])'
    )


mlir.register_lowering(_collective, _refuse)
mlir.register_lowering(_collective, _lower, platform="cpu", cacheable=False)


def _transpose(cotangent: Any, x: Any, *, call: _Call) -> list[Any]:
    if call.collective == "reduce_scatter" and call.op == "avg":
        cotangent = cotangent / call.comm.size
    return [_collective.bind(cotangent, call=call.transposed())]


ad.deflinear2(_collective, _transpose)
_linear = ad.primitive_jvps[_collective]


def _differentiate(values: Any, tangents: Any, *, call: _Call) -> Any:
    if call.op not in ("sum", "avg"):
        raise NotImplementedError(
            f'{call.collective} with op="{call.op}" has no derivative: use "sum" or "avg", or pass'
            " jax.lax.stop_gradient(x)"
        )
    return _linear(values, tangents, call=call)


ad.primitive_jvps[_collective] = _differentiate


def _batch(arguments: Any, axes: Any, *, call: _Call) -> Any:
    """One call for the whole batch, which is one more axis, beside axis 0 where that one has a meaning."""
    (x,), (axis,) = arguments, axes
    if call.collective not in _ELEMENTWISE:
        x, axis = jnp.moveaxis(x, axis, 1), 1
    return _collective.bind(x, call=call), axis


batching.primitive_batchers[_collective] = _batch
