"""Collectives on JAX's arrays. JAX is imported in ranks alone: its threads do not survive fork()."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import outcomes_of, run, started

import pycomm
from pycomm import Communicator

HERE = importlib.util.find_spec("jax") is not None
needs_jax = pytest.mark.skipif(not HERE, reason="JAX is not installed")
ROOT = Path(__file__).parents[2]
ROWS = 6  # for 1, 2 and 3 ranks to share

Array = Any


def modules() -> tuple[Any, Any, Any]:
    """jax, jax.numpy and pycomm.jax, with 64-bit types."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    import pycomm.jax

    jax.config.update("jax_enable_x64", True)
    return jax, jnp, pycomm.jax


def drawn(size: int, shape: tuple[int, ...], seed: int = 0) -> list[Array]:
    """Every rank's array, the same wherever this is called."""
    return [np.random.default_rng([seed, rank]).standard_normal(shape) for rank in range(size)]


def parts(x: Array, size: int) -> list[Array]:
    return np.split(x, size)


# What each rank has at the end, of what each has in the beginning; and the transpose, from its definition: an
# element's gradient is the sum of the cotangents of all elements that it went into, times its factor in each.
LINEAR: dict[str, tuple[Callable[..., Any], Callable[..., list[Array]], Callable[..., list[Array]]]] = {
    "all_reduce, sum": (
        lambda pj, x, comm: pj.all_reduce(x, comm),
        lambda xs: [sum(xs)] * len(xs),
        lambda ts: [sum(ts)] * len(ts),
    ),
    "all_reduce, avg": (
        lambda pj, x, comm: pj.all_reduce(x, comm, "avg"),
        lambda xs: [sum(xs) / len(xs)] * len(xs),
        lambda ts: [sum(ts) / len(ts)] * len(ts),
    ),
    "all_gather": (
        lambda pj, x, comm: pj.all_gather(x, comm),
        lambda xs: [np.concatenate(xs)] * len(xs),
        lambda ts: parts(sum(ts), len(ts)),
    ),
    "reduce_scatter, sum": (
        lambda pj, x, comm: pj.reduce_scatter(x, comm),
        lambda xs: parts(sum(xs), len(xs)),
        lambda ts: [np.concatenate(ts)] * len(ts),
    ),
    "reduce_scatter, avg": (
        lambda pj, x, comm: pj.reduce_scatter(x, comm, "avg"),
        lambda xs: parts(sum(xs) / len(xs), len(xs)),
        lambda ts: [np.concatenate(ts) / len(ts)] * len(ts),
    ),
    "all_to_all": (
        lambda pj, x, comm: pj.all_to_all(x, comm),
        lambda xs: [np.concatenate([parts(x, len(xs))[rank] for x in xs]) for rank in range(len(xs))],
        lambda ts: [np.concatenate([parts(t, len(ts))[rank] for t in ts]) for rank in range(len(ts))],
    ),
    "broadcast": (
        lambda pj, x, comm: pj.broadcast(x, comm, comm.size - 1),
        lambda xs: [xs[-1]] * len(xs),
        lambda ts: [np.zeros_like(ts[0])] * (len(ts) - 1) + [sum(ts)],
    ),
}


def close(got: Array, want: Array) -> None:
    assert got.shape == np.shape(want)
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-13, atol=1e-13)


@needs_jax
@pytest.mark.parametrize("size", [1, 2, 3])
def test_values(size: int) -> None:
    def fn(comm: Communicator) -> None:
        jax, jnp, pj = modules()
        xs = drawn(size, (ROWS, 2))
        x = jnp.asarray(xs[comm.rank])
        for call, expected, _ in LINEAR.values():
            want = expected(xs)[comm.rank]
            close(call(pj, x, comm), want)
            close(jax.jit(lambda x, call=call: call(pj, x, comm))(x), want)
            close(jax.jit(lambda x, call=call: call(pj, x, comm)).lower(x).compile()(x), want)
            with jax.disable_jit():
                close(call(pj, x, comm), want)
            # What the collective gets, and what becomes of its result, is in another layout.
            close(jax.jit(lambda x, call=call: call(pj, x.T.T, comm).T)(x), want.T)
        for op, of in {"min": np.min, "max": np.max, "prod": np.prod}.items():
            close(pj.all_reduce(x, comm, op), of(xs, axis=0))
            close(
                jax.jit(lambda x, op=op: pj.reduce_scatter(x, comm, op))(x),
                parts(of(xs, axis=0), size)[comm.rank],
            )
        assert np.array_equal(x, xs[comm.rank]), "the input has changed"

    run(fn, size)


@needs_jax
def test_shapes_and_types() -> None:
    def fn(comm: Communicator) -> None:
        jax, jnp, pj = modules()
        names = "float64 float32 float16 bfloat16 int8 int16 int32 int64 uint8 uint32 complex64 complex128"

        @jax.jit
        def both(x: Array) -> tuple[Array, Array]:
            return pj.all_reduce(x, comm), pj.all_gather(x[:1], comm)

        for name in names.split():
            total, ranks = both(jnp.full(5, comm.rank + 1, name))
            assert total.dtype == name and (total == 3).all(), name
            assert ranks.dtype == name and ranks.tolist() == [1, 2], name
        flags = pj.all_reduce(jnp.array([True, comm.rank == 0]), comm, "band")
        assert flags.dtype == bool and flags.tolist() == [True, False]
        assert pj.all_reduce(2.0, comm) == 4 and pj.all_reduce(np.float32(3), comm).dtype == np.float32
        assert pj.all_gather(jnp.ones((0, 3)), comm).shape == (0, 3)
        assert pj.broadcast(jnp.full((2, 0), comm.rank), comm).shape == (2, 0)
        large = pj.all_reduce(jnp.arange(1 << 20, dtype="float32") + comm.rank, comm)
        assert (np.asarray(large) == 2 * np.arange(1 << 20) + 1).all()

    run(fn, 2)


@needs_jax
@pytest.mark.parametrize("size", [1, 2, 3])
def test_derivatives(size: int) -> None:
    def fn(comm: Communicator) -> None:
        jax, jnp, pj = modules()
        xs = drawn(size, (ROWS, 2))
        x = jnp.asarray(xs[comm.rank])
        for call, expected, transposed in LINEAR.values():
            shapes = [y.shape for y in expected(xs)]
            ts = drawn(size, shapes[0], seed=1)
            want = transposed(ts)[comm.rank]

            def loss(x: Array, call: Any = call, ts: Any = ts) -> Array:
                return (call(pj, x, comm) * ts[comm.rank]).sum()

            close(jax.grad(loss)(x), want)
            close(jax.jit(jax.grad(loss))(x), want)
            close(jax.grad(jax.jit(loss))(x), want)
            # Forward: the map is linear, so its derivative along x is its value.
            close(jax.jvp(lambda x, call=call: call(pj, x, comm), (x,), (x,))[1], expected(xs)[comm.rank])
            # And twice: of half the sum of squares, the second derivative is the map and then its transpose.
            squares = jax.grad(lambda x, call=call: (call(pj, x, comm) ** 2).sum() / 2)
            close(squares(x), transposed(expected(xs))[comm.rank])
            vs = drawn(size, (ROWS, 2), seed=2)
            got = jax.jit(lambda x, v, of=squares: jax.jvp(of, (x,), (v,))[1])(x, vs[comm.rank])
            close(got, transposed(expected(vs))[comm.rank])
            # The same in reverse, which transposes the transpose.
            twice = jax.grad(lambda x, of=squares, v=vs[comm.rank]: (of(x) * v).sum())
            close(twice(x), transposed(expected(vs))[comm.rank])

    run(fn, size)


@needs_jax
def test_derivatives_against_differences() -> None:
    def fn(comm: Communicator) -> None:
        _, jnp, pj = modules()
        from jax.test_util import check_grads

        x = jnp.asarray(drawn(1, (ROWS, 2))[0])
        for call, _, _ in LINEAR.values():
            check_grads(lambda x, call=call: jnp.sin(call(pj, x, comm)), (x,), order=2, modes=["fwd", "rev"])
        z = x + 2j * x[::-1]
        check_grads(lambda z: pj.all_reduce(z, comm) ** 2, (z,), order=1, modes=["fwd", "rev"])

    run(fn, 1)


@needs_jax
def test_data_parallel_gradient_is_that_of_all_rows() -> None:
    def fn(comm: Communicator) -> None:
        jax, jnp, pj = modules()
        rows, targets = np.concatenate(drawn(2, (ROWS, 3))), np.concatenate(drawn(2, (ROWS,), seed=1))
        mine = slice(comm.rank * ROWS, (comm.rank + 1) * ROWS)
        weights = jnp.array([0.5, -1.0, 2.0])

        def loss(weights: Array) -> Array:
            errors = rows[mine] @ pj.broadcast(weights, comm) - targets[mine]
            return pj.all_reduce((errors**2).mean(), comm, "avg")

        value, gradient = jax.jit(jax.value_and_grad(loss))(weights)
        errors = rows @ np.array([0.5, -1.0, 2.0]) - targets
        close(value, (errors**2).mean())
        # Both losses are the mean over all rows. Their sum is what is differentiated, by the root's weights.
        close(gradient, (2 * 2 * rows.T @ errors / (2 * ROWS)) * (comm.rank == 0))

    run(fn, 2)


@needs_jax
def test_loops_and_branches() -> None:
    def fn(comm: Communicator) -> None:
        jax, jnp, pj = modules()
        lax = jax.lax
        x = jnp.asarray(drawn(2, (3,))[comm.rank])
        total = sum(drawn(2, (3,)))

        def step(c: Array, _: Any = None) -> tuple[Array, Array]:
            c = pj.all_reduce(c, comm)
            return c, c

        def scanned(x: Array) -> Array:
            return lax.scan(step, x, None, length=3)[0]

        close(scanned(x), 4 * total)
        close(jax.jit(scanned)(x), 4 * total)
        for of in (jax.grad(lambda x: scanned(x).sum()), jax.jit(jax.grad(lambda x: scanned(x).sum()))):
            close(of(x), np.full(3, 8.0))
        # Not linear: d/dx of (2 s)^2 + ... needs each trip's own value, s = x0 + x1 in the first.
        cubes = jax.grad(
            lambda x: lax.scan(lambda c, _: (pj.all_reduce(c, comm) ** 2, None), x, None, length=2)[0].sum()
        )
        close(cubes(x), 2 * (2 * 2 * total**2) * 2 * (2 * total))
        close(lax.fori_loop(0, 2, lambda _, c: step(c)[0], x), 2 * total)
        count, last = lax.while_loop(
            lambda c: pj.all_reduce(c[0], comm) < 8, lambda c: (c[0] + 1, step(c[1])[0]), (jnp.array(0), x)
        )
        assert count == 4
        close(last, 8 * total)
        close(lax.cond(count > 3, lambda x: step(x)[0], lambda x: x, x), total)
        close(
            jax.grad(lambda x: lax.cond(count > 3, lambda x: step(x)[0], lambda x: x, x).sum())(x),
            np.full(3, 2.0),
        )
        close(lax.map(lambda x: step(x)[0], x), total)

        @jax.custom_vjp
        def own(x: Array) -> Array:
            return step(x)[0]

        own.defvjp(lambda x: (own(x), None), lambda _, t: (10 * pj.all_reduce(t, comm),))
        close(jax.jit(jax.grad(lambda x: own(x).sum()))(x), np.full(3, 20.0))

    run(fn, 2)


@needs_jax
def test_a_batch_is_one_call() -> None:
    def fn(comm: Communicator) -> None:
        jax, jnp, pj = modules()
        batches = drawn(2, (4, ROWS, 3))
        x = jnp.asarray(batches[comm.rank])
        comm.log_calls(100)
        for call, expected, transposed in LINEAR.values():
            want = np.stack([expected([batch[i] for batch in batches])[comm.rank] for i in range(4)])
            comm.take_log()
            close(jax.jit(jax.vmap(lambda x, call=call: call(pj, x, comm)))(x), want)
            jax.effects_barrier()
            assert len(comm.take_log()[0]) == 1
            moved = jax.vmap(lambda x, call=call: call(pj, x, comm), in_axes=2, out_axes=1)
            close(moved(jnp.moveaxis(x, 0, 2)), np.moveaxis(want, 0, 1))
            ts = drawn(2, want.shape[1:], seed=1)
            gradients = jax.vmap(
                jax.grad(lambda x, call=call, ts=ts: (call(pj, x, comm) * ts[comm.rank]).sum())
            )(x)
            close(gradients, np.stack([transposed(ts)[comm.rank]] * 4))

    run(fn, 2)


@needs_jax
def test_calls_keep_the_order_of_the_program() -> None:
    """Calls that need nothing of each other, in one compiled program, in several, and outside."""

    def fn(comm: Communicator) -> list[tuple[str, int]]:
        jax, jnp, pj = modules()

        @jax.jit
        def program(x: Array) -> list[Array]:
            heavy = x
            for _ in range(3):
                heavy = jnp.tanh(heavy @ heavy)
            late = pj.all_reduce(heavy, comm)  # is ready last, and is called first
            early = [pj.all_gather(x[:n], comm) for n in (5, 1, 3)]
            pj.broadcast(x[:2], comm)  # whose result nobody uses
            return [late, *early]

        x = jnp.ones((300, 300))
        comm.log_calls(100)
        comm.take_log()
        program(x)
        pj.all_to_all(x[:4], comm)
        program(x)
        jax.effects_barrier()
        return [(call[1], call[5]) for call in comm.take_log()[0]]

    names = ["all_reduce", "all_gather", "all_gather", "all_gather", "broadcast"]
    outcomes = run(fn, 2)
    assert outcomes[0] == outcomes[1]
    assert [name for name, _ in outcomes[0]] == [*names, "all_to_all", *names]
    gathered = [size for name, size in outcomes[0] if name == "all_gather"]
    assert [size // min(gathered) for size in gathered] == [5, 1, 3, 5, 1, 3]


@needs_jax
def test_communicators_as_static_arguments() -> None:
    def fn(comm: Communicator) -> None:
        jax, jnp, pj = modules()
        traced = []

        def total(x: Array, comm: Communicator) -> Array:
            traced.append(comm)
            return pj.all_reduce(x, comm)

        compiled = jax.jit(total, static_argnums=1)
        alone = comm.split(comm.rank)
        assert alone is not None
        for _ in range(3):
            assert compiled(jnp.ones(()), comm) == 2
            assert compiled(jnp.ones(()), alone) == 1
            assert pj.all_reduce(jnp.ones(()), comm) == 2
            assert pj.all_reduce(jnp.ones(()), alone) == 1
        assert traced == [comm, alone]

    run(fn, 2)


@needs_jax
def test_one_core_with_inputs_still_being_computed() -> None:
    """The callback then runs on the one thread that JAX has for what it computes beside the program."""

    def fn(comm: Communicator) -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        jax, jnp, pj = modules()
        heavy = jax.jit(lambda x: jnp.tanh(x @ x) @ x)
        reduce = jax.jit(lambda x: pj.all_reduce(x, comm))
        for _ in range(5):
            x = reduce(reduce(heavy(jnp.ones((700, 700), "float32"))))
        assert x.block_until_ready().shape == (700, 700)

    run(fn, 2)


@needs_jax
def test_what_is_refused_before_anything_moves() -> None:
    def fn(comm: Communicator) -> None:
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        jax, jnp, pj = modules()
        x = jnp.ones((3, 2))

        def refused(kind: type[Exception], text: str, call: Callable[[], Any]) -> None:
            with pytest.raises(kind, match=text):
                call()
            with pytest.raises(kind, match=text):
                jax.jit(call)()

        refused(TypeError, "`comm` is None: pass a Communicator", lambda: pj.all_reduce(x, None))
        refused(
            TypeError,
            "op 'avg' makes no sense on int32",
            lambda: pj.all_reduce(x.astype("int32"), comm, "avg"),
        )
        refused(TypeError, "op 'sum' makes no sense on bool", lambda: pj.reduce_scatter(x > 0, comm))
        refused(TypeError, "dtype 'int4' is not supported", lambda: pj.all_gather(x.astype("int4"), comm))
        refused(ValueError, "op 'mean' is unknown", lambda: pj.all_reduce(x, comm, "mean"))
        refused(ValueError, "`root` is 2: ranks of this group are 0 to 1", lambda: pj.broadcast(x, comm, 2))
        refused(ValueError, "`root` is -1", lambda: pj.broadcast(x, comm, -1))
        refused(TypeError, "`root` is 'a'", lambda: pj.broadcast(x, comm, "a"))
        refused(ValueError, "3 rows on 2 ranks", lambda: pj.reduce_scatter(x, comm))
        refused(ValueError, "3 rows on 2 ranks", lambda: pj.all_to_all(x, comm))
        refused(ValueError, "all_gather of a number", lambda: pj.all_gather(1.0, comm))
        for op in ("max", "min", "prod"):
            of = jax.grad(lambda x, op=op: pj.all_reduce(x, comm, op).sum())
            refused(NotImplementedError, f'op="{op}" has no derivative', lambda of=of: of(x))
        of = jax.grad(jax.checkpoint(lambda x: jnp.sin(pj.all_reduce(x, comm)).sum()))
        refused(NotImplementedError, "Effects not supported .* `checkpoint`", lambda: of(x))
        of = jax.vmap(lambda x: jax.lax.cond(x[0] > 0, lambda x: pj.all_reduce(x, comm), lambda x: x, x))
        refused(NotImplementedError, "IO effect not supported in vmap-of-cond", lambda: of(x))

        traced = jax.jit(lambda x: pj.all_reduce(x, comm)).trace(x)
        with pytest.raises(NotImplementedError, match="all_reduce takes CPU arrays: .* JAX_PLATFORMS=cpu"):
            traced.lower(lowering_platforms=("cuda",))

        devices = "all_reduce in a program of 2 devices|Ordered effects not supported in `pmap`"
        mesh = jax.sharding.Mesh(jax.devices(), "i")
        rows = jax.sharding.PartitionSpec("i")
        four = jnp.ones(4)
        sharded = jax.device_put(four, jax.sharding.NamedSharding(mesh, rows))
        for call in (
            lambda: jax.pmap(lambda x: pj.all_reduce(x, comm))(jnp.ones((2, 3))),
            lambda: jax.shard_map(lambda x: pj.all_reduce(x, comm), mesh=mesh, in_specs=rows, out_specs=rows)(
                four
            ),
            lambda: jax.jit(lambda x: pj.all_reduce(x, comm))(sharded),
            lambda: pj.all_reduce(sharded, comm),
        ):
            with pytest.raises(
                (NotImplementedError, ValueError), match=devices
            ):  # pmap's is JAX's before 0.10
                call()
        # No derivative is asked for where it is stopped; and nothing above has moved this rank.
        stopped = jax.grad(lambda x: (x * pj.all_reduce(jax.lax.stop_gradient(x), comm, "max")).sum())
        assert (stopped(x) == 1).all()

    run(fn, 2)


@needs_jax
def test_rank_threads_are_refused() -> None:
    def fn(comm: Communicator) -> None:
        _, jnp, pj = modules()

        def refused(comm: Communicator) -> None:
            for each in (comm, comm.split(0)):
                assert each is not None
                with pytest.raises(ValueError, match="threads of one process .* `pycomm run -n 2"):
                    pj.all_reduce(jnp.ones(3), each)

        pycomm.run_local(refused, 2)
        assert pycomm.run_local(lambda comm: float(pj.all_reduce(2.0, comm)), 1) == [2.0]

    run(fn, 1)


@needs_jax
@pytest.mark.parametrize("waiting", [False, True], ids=["at once", "inputs still being computed"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_killed_rank_is_named(size: int, waiting: bool) -> None:
    def fn(comm: Communicator) -> str:
        jax, jnp, pj = modules()
        reduce = jax.jit(lambda x: pj.all_reduce(x, comm))
        x = jnp.ones((900, 900), "float32")
        reduce(x).block_until_ready()
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            if waiting:
                x = jax.jit(lambda x: jnp.tanh(x @ x) @ x)(x)
            reduce(x).block_until_ready()
        except jax.errors.JaxRuntimeError as error:
            assert isinstance(error, RuntimeError)
            return str(error)
        return "no error"

    with started(fn, size) as ranks:
        outcomes = outcomes_of(ranks)
    for rank, outcome in enumerate(outcomes):
        if rank != 1:
            assert re.search(r"PeerLostError: rank 1 \(pid \d+\) has ended", str(outcome)), outcome


@needs_jax
def test_calls_that_differ_are_named() -> None:
    def fn(comm: Communicator) -> str:
        jax, jnp, pj = modules()
        with pytest.raises(jax.errors.JaxRuntimeError, match="MismatchError") as caught:
            jax.jit(lambda x: pj.all_reduce(x, comm))(jnp.ones(3 + comm.rank))
        return str(caught.value)

    with started(fn, 2) as ranks:
        for outcome in outcomes_of(ranks):
            assert "count=3" in str(outcome) and "count=4" in str(outcome), outcome


@needs_jax
@pytest.mark.parametrize("size", [1, 2])
def test_the_example_loses_on_all_ranks_what_it_loses_on_one(size: int) -> None:
    script = ROOT / "examples" / "jax_data_parallel.py"
    command = [sys.executable, "-m", "pycomm", "run", "-n", str(size), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = re.findall(rf"loss ([\d.]+) on {size} ranks, ([\d.]+) on one", done.stdout)
    assert len(losses) == 5
    together, alone = np.array(losses, float).T
    np.testing.assert_allclose(together, alone, atol=2e-6)  # float32, printed with six digits
    assert together[-1] < together[0] / 10


@needs_jax
def test_every_public_name_is_in_the_reference_and_has_a_docstring() -> None:
    def fn(comm: Communicator) -> dict[str, str | None]:
        _, _, pj = modules()
        return {name: getattr(pj, name).__doc__ for name in pj.__all__}

    [docstrings] = run(fn, 1)
    reference = (ROOT / "docs" / "api" / "jax.md").read_text()
    assert sorted(docstrings) == sorted(
        re.findall(r"^\.\. autofunction:: pycomm\.jax\.(\w+)$", reference, re.MULTILINE)
    )
    assert all(docstrings.values())


def test_pycomm_does_not_import_jax() -> None:
    script = "import sys, pycomm; pycomm.init; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_without_jax_the_import_says_what_to_install() -> None:
    script = "import sys; sys.modules['jax'] = None\nimport pycomm.jax"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ImportError: pycomm.jax needs JAX, 0.7 or later: `pip install jax`" in done.stderr
