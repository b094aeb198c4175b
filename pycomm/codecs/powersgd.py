"""PowerSGD: each gradient that is a matrix crosses between ranks as two thin factors of it."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pycomm import _native, checks, layouts
from pycomm.bucket import checked_names, refuse_twice, separate
from pycomm.codecs.feedback import CallResiduals, ErrorFeedback
from pycomm.codecs.kinds import Codec, resolve, with_residuals
from pycomm.gradients import is_parameter, is_tensor

Factor = npt.NDArray[np.float32]
_DTYPES = ("float32", "float16", "bfloat16")
_DEPENDENT = 1e-12  # a column that keeps less than this share of its norm depends on those before it
_CACHED = 1 << 16  # elements of a product that are computed together


class PowerSGD:
    """Averages gradients; each matrix among them crosses as two factors that have `rank` columns.

    A step of a matrix M, of n rows and m columns, with the factor Q (m x rank) of the step before: P is the
    average of M Q over the ranks, made orthonormal; Q is the average of M^T P; the result is P Q^T. What a
    rank's own factors miss of its M, M - P P^T M, is its residual, which the next step adds to M. So a step
    is one power iteration, and the steps together find the largest singular vectors. (Vogels, Karimireddy and
    Jaggi, PowerSGD: practical low-rank gradient compression for distributed optimization, NeurIPS 2019,
    algorithms 1 and 2.)

    A gradient of more than two dimensions is the matrix of its first dimension by the others. What has fewer
    than two dimensions, has no more bytes than its factors, 4 (n + m) rank, or is exempt by the
    ErrorFeedback's rule, is averaged exactly. A world of one rank compresses like any other.

    `rank`: columns of the factors, at least 1. `seed`: of the first factors, the same on all ranks.
    `error_feedback`: an ErrorFeedback, which keeps the residuals; True for one of this object's own; False
    for none, with which training does not converge to the same loss.

    Sums, residuals and factors are float32, also for float16 and bfloat16. All ranks get the same bits. In a
    step whose result holds NaN or Inf, factors and residuals stay as they are. Each rank makes one object for
    each communicator and keeps it over the steps; it is not thread-safe.
    """

    name = "powersgd"

    def __init__(self, rank: int = 4, *, seed: int = 0, error_feedback: ErrorFeedback | bool = True) -> None:
        self.rank = checks.integer(rank, "rank")
        if self.rank < 1:
            raise ValueError(f"`rank` is {rank}: factors have at least 1 column")
        self.seed = checks.integer(seed, "seed")
        if self.seed < 0:
            raise ValueError(f"`seed` is {seed}: pass 0 or more")
        if not isinstance(error_feedback, (bool, ErrorFeedback)):
            raise TypeError(f"error_feedback={error_feedback!r}: an ErrorFeedback, True or False")
        own = ErrorFeedback() if error_feedback is True else error_feedback
        self._feedback = own or None
        self._factors: dict[str, Factor] = {}
        self._open: list[Exchange] = []  # begun and not finished, in order
        self._of_torch = False

    @property
    def error_feedback(self) -> ErrorFeedback | None:
        """What keeps the residuals: for its `scale` and `skip()`. None without error feedback."""
        return self._feedback

    def all_reduce(
        self, gradients: Iterable[Any], comm: _native.Communicator, *, names: Iterable[str] | None = None
    ) -> list[Any]:
        """Replaces each gradient by its average over the ranks of `comm`; returns the gradients.

        `gradients`: NumPy arrays or torch CPU tensors of float32, float16 or bfloat16, contiguous, of any
        shapes, the same on all ranks. `names`: by which factors and residuals are kept over the steps; "0",
        "1", ... by default.

        Raises TypeError or ValueError for what cannot be averaged, before anything has moved; CommError when
        the group has failed, and the gradients are then undefined.
        """
        if not isinstance(comm, _native.Communicator):
            raise TypeError(f"`comm` is {checks.shown(comm)}: pass a pycomm.Communicator")
        given = separate(gradients, "gradients")
        found = checked_names(names, len(given))
        refuse_twice(given, found)
        self.begin(given, comm, found).wait()
        return given

    def state_dict(self) -> dict[str, Any]:
        """What a later run needs: this rank's "residuals" and the "factors", equal on all ranks, by name.

        Residuals are 1-D float32, factors (m, rank) float32: NumPy arrays, or torch tensors if gradients
        were tensors. Waits for calls in progress.
        """
        factors = self.factors
        residuals = {} if self._feedback is None else self._feedback.state_dict()
        return {"residuals": residuals, "factors": factors}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Goes on where state_dict() was called: `state` is this rank's, or a list of those of all old ranks
        where there are now more or fewer.

        Of a list the residuals' mean is kept, see ErrorFeedback.load_state_dict, which also says what is a
        ValueError; so are factors of another rank. Nothing changes then.
        """
        states: list[Any] = list(state) if isinstance(state, (list, tuple)) else [state]
        parts = {"residuals", "factors"}
        if not states or not all(isinstance(each, Mapping) and parts <= each.keys() for each in states):
            raise ValueError("`state` is not a PowerSGD's: pass a state_dict(), or a list of them")
        factors = {name: self._checked(name, factor) for name, factor in states[0]["factors"].items()}
        self._finish_all()
        if self._feedback is not None:
            self._feedback.load_state_dict([each["residuals"] for each in states])
        self._factors = factors

    def __repr__(self) -> str:
        return f"<pycomm.codecs.PowerSGD of rank {self.rank}, {len(self._factors)} matrices so far>"

    # ---- for the reducer and for pycomm.torch ----

    def compressed(self, names: Sequence[str], gradients: Sequence[Any]) -> list[int]:
        """Which of these gradients cross as factors."""
        shapes = [tuple(x.shape) for x in gradients]
        exempt = set() if self._feedback is None else set(self._feedback.exempted(names, shapes))
        smaller = [self.wire_bytes(s) < x.nbytes for s, x in zip(shapes, gradients, strict=True)]
        return [i for i in range(len(shapes)) if smaller[i] and i not in exempt]

    def wire_bytes(self, shape: tuple[int, ...]) -> float:
        """Of the two factors of a gradient of this shape; infinity for what is no matrix."""
        return 4 * self.rank * (shape[0] + math.prod(shape[1:])) if len(shape) > 1 else math.inf

    def begin(self, gradients: Sequence[Any], comm: _native.Communicator, names: Sequence[str]) -> Exchange:
        """Starts an all_reduce of gradients that wait() will complete.

        All ranks begin the same exchanges in the same order, since beginning one makes the next call of those
        before. Raises as all_reduce() does.
        """
        self.turn()
        for earlier in [each for each in self._open if not set(each.names).isdisjoint(names)]:
            earlier.wait()
        exchange = Exchange(self, gradients, comm, names)
        exchange.start()
        self._open.append(exchange)
        return exchange

    def turn(self) -> None:
        """Makes the second call of all exchanges that have been begun; blocks until the first has ended."""
        for exchange in self._open:
            exchange.turn()

    def factor(self, name: str, columns: int) -> Factor:
        """The factor Q that the next step of this matrix starts from; columns have norm 1."""
        found = self._factors.get(name)
        if found is None:
            found = self._factors[name] = _normal(self._drawn(name, columns), None)
        if found.shape != (columns, self.rank):
            raise ValueError(
                f"{name!r} has {columns} columns here, but its factor has shape {found.shape}: a name belongs"
                " to one gradient only, and a state to one model and one rank of PowerSGD"
            )
        return found

    def finished(self, exchange: Exchange, factors: Mapping[str, Factor] | None) -> None:
        """Takes the factors of an exchange, None if they are of no use."""
        self._open = [each for each in self._open if each is not exchange]
        self._of_torch |= exchange.of_torch
        for name, factor in (factors or {}).items():
            self._factors[name] = _normal(factor, self._drawn(name, len(factor)))

    @property
    def factors(self) -> dict[str, Any]:
        """The part of state_dict() that is equal on all ranks."""
        self._finish_all()
        copies = {name: factor.copy() for name, factor in self._factors.items()}
        return {name: _tensor(each) for name, each in copies.items()} if self._of_torch else dict(copies)

    def load_factors(self, factors: Mapping[str, Any]) -> None:
        """Replaces all factors. Raises ValueError, and changes nothing, for those of another rank."""
        self._factors = {name: self._checked(name, factor) for name, factor in factors.items()}

    def _drawn(self, name: str, columns: int) -> Factor:
        digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
        drawn = np.random.default_rng([self.seed, digest]).standard_normal((columns, self.rank))
        return drawn.astype(np.float32)

    def _checked(self, name: str, factor: Any) -> Factor:
        found = np.array(factor.detach().cpu() if is_tensor(factor) else factor, np.float32)
        if found.ndim != 2 or found.shape[1] != self.rank or not np.isfinite(found).all():
            raise ValueError(
                f"`state`: the factor of {name!r} has shape {found.shape}, not (columns, {self.rank}), or is"
                ' not finite: make the PowerSGD with the rank that it had, or pass "factors" that are empty'
            )
        return found

    def _finish_all(self) -> None:
        with contextlib.suppress(_native.CommError):  # which whoever waits for the gradients gets
            for exchange in list(self._open):
                exchange.wait()
        self._open.clear()


class Exchange:
    """One all_reduce of a PowerSGD, made of three calls of the communicator.

    start() sends P and what is not compressed, turn() sends Q, wait() brings the averages to the gradients.
    """

    def __init__(
        self, owner: PowerSGD, gradients: Sequence[Any], comm: _native.Communicator, names: Sequence[str]
    ) -> None:
        given = [_checked_gradient(x, i) for i, x in enumerate(gradients)]
        shapes = [tuple(x.shape) for x in given]
        chosen = owner.compressed(names, given)
        self.names = [names[i] for i in chosen]
        self.of_torch = any(is_tensor(given[i]) for i in chosen)
        self._owner, self._comm = owner, comm
        self._tag = layouts.signature(list(names), shapes)
        self._chosen = (
            f"of {len(chosen)}, #{hashlib.blake2b(repr(chosen).encode(), digest_size=4).hexdigest()}"
        )
        self._rest = [x for i, x in enumerate(given) if i not in set(chosen)]
        self._matrices = [given[i].reshape(shapes[i][0], -1) for i in chosen]
        sizes = [tuple(x.shape) for x in self._matrices]
        old = [owner.factor(name, m) for name, (_, m) in zip(self.names, sizes, strict=True)]
        self._p, self._ps = _views([(n, owner.rank) for n, _ in sizes])
        self._q, self._qs = _views([(m, owner.rank) for _, m in sizes])
        for view, factor in zip(self._qs, old, strict=True):
            view[:] = factor
        self._of_call: CallResiduals | None = None
        feedback = owner.error_feedback
        if feedback is not None and self._matrices:
            ends = np.cumsum([n * m for n, m in sizes]).tolist()
            places = tuple(zip(self.names, [0, *ends[:-1]], ends, strict=True))
            self._of_call = feedback.residuals(comm, places, ends[-1], self.of_torch, Kept)
            self._scale = feedback.scale
        self._works: list[Any] = []
        self._turned = self._done = False

    def start(self) -> None:
        self._values = self._with_residuals()
        with np.errstate(invalid="ignore", over="ignore"):  # the result is NaN, and is seen there
            for x, p, q in zip(self._values, self._ps, self._qs, strict=True):
                _like(p, x)[:] = x @ _like(q, x)
        if self._matrices:
            self._send(self._p, f"matrices {self._chosen}, bucket")
        if self._rest:
            self._send(self._rest, "uncompressed")
        if self._of_call is not None:
            assert self._owner.error_feedback is not None
            self._owner.error_feedback.begun(self._comm, self._of_call)
            self._of_call.start(self)

    def turn(self) -> None:
        if self._turned:
            return
        if self._matrices:
            self._wait_for(self._works[:1])
            for x, p, q in zip(self._values, self._ps, self._qs, strict=True):
                p[:] = orthonormal(p)
                with np.errstate(invalid="ignore", over="ignore"):
                    _like(q, x)[:] = x.T @ _like(p, x)
            self._own = [q.copy() for q in self._qs]
            self._send(self._q, "factors")
        self._turned = True

    def is_completed(self) -> bool:
        return self._done

    def wait(self) -> None:
        """Raises CommError when the group has failed."""
        if self._done:
            return
        self.turn()
        self._wait_for(self._works)
        with np.errstate(invalid="ignore", over="ignore"):
            for x, p, q in zip(self._matrices, self._ps, self._qs, strict=True):
                _write_product(x, p, q)
        written = [self._q, *self._matrices, *self._rest]  # a product may be beyond the gradients' type
        finite = all(_is_finite(x) for x in written)
        if self._of_call is not None and finite:
            for x, p, q in zip(self._values, self._ps, self._own, strict=True):
                x -= _like(p, x) @ _like(q, x).T
                x /= self._scale
            kept: Kept = self._of_call.residuals
            kept.commit()
        self._done = True
        self._owner.finished(self, dict(zip(self.names, self._qs, strict=True)) if finite else None)

    def _wait_for(self, works: Sequence[Any]) -> None:
        try:
            for work in works:
                work.wait()
        except _native.CommError:
            self._owner.finished(self, None)
            raise

    def _send(self, what: Any, word: str) -> None:
        try:
            work = self._comm.all_reduce(what, op="avg", async_op=True, tag=f"{word} {self._tag}")
        except _native.AbortedError:
            for earlier in self._works:
                earlier.wait()  # raises what ended the group
            raise
        self._works.append(work)

    def _with_residuals(self) -> list[Any]:
        """The matrices as float32, with what is owed: where the next residuals will be."""
        if self._of_call is None:
            return [x.float() if is_tensor(x) else np.asarray(x, np.float32) for x in self._matrices]
        self._of_call.settle()
        kept: Kept = self._of_call.residuals
        now, following = kept.now, kept.overwritten()
        values, at = [], 0
        for x in self._matrices:
            part = slice(at, at + math.prod(x.shape))
            at = part.stop
            value = _like(following[part].reshape(x.shape), x)
            value[:] = x
            value += _like(now[part].reshape(x.shape), x) * self._scale
            values.append(value)
        return values


class Kept:
    """Residuals of a call, with those of the step before: what _native.Residuals is to native calls."""

    def __init__(self, count: int) -> None:
        self.now = np.zeros(count, np.float32)
        self._other = np.empty(count, np.float32)  # those of the last step or of the next one
        self._changed = False

    def overwritten(self) -> npt.NDArray[np.float32]:
        """Where to write the next step's residuals, which commit() makes those that hold."""
        self._changed = False
        return self._other

    def commit(self) -> None:
        self.now, self._other = self._other, self.now
        self._changed = True

    def take_back(self) -> None:
        """Undoes the last commit, once."""
        if self._changed:
            self.now, self._other = self._other, self.now
        self._changed = False


def orthonormal(p: Factor) -> Factor:
    """Orthonormal columns that span what the columns of `p`, (n, rank), do; NaN if `p` is not finite.

    Gram-Schmidt, each column twice, in float64. A column that depends on those before it becomes zeros. The
    sums are NumPy's, whose bits do not depend on the number of threads, as those of a BLAS may.
    """
    if not np.isfinite(p).all():
        return np.full_like(p, np.nan)
    rows = np.ascontiguousarray(p.T, np.float64)
    for k, row in enumerate(rows):
        before = math.sqrt((row * row).sum())
        for done in [*rows[:k], *rows[:k]]:
            row -= (row * done).sum() * done
        norm = math.sqrt((row * row).sum())
        row *= 1 / norm if norm > _DEPENDENT * before else 0.0
    return np.asarray(rows.T, np.float32)


def _normal(factor: Factor, instead: Factor | None) -> Factor:
    """The factor with columns of norm 1; columns of zeros, from which nothing would grow, are replaced."""
    columns = factor.T.astype(np.float64)
    norms = np.sqrt((columns * columns).sum(axis=1))
    if instead is not None and not norms.all():
        columns[norms == 0] = instead.T[norms == 0]
        norms = np.sqrt((columns * columns).sum(axis=1))
    return np.ascontiguousarray((columns / norms[:, np.newaxis]).T, np.float32)


def _write_product(out: Any, p: Factor, q: Factor) -> None:
    """out = p q^T, computed element by element in one order: a matrix product of a BLAS may have other bits
    on a rank with other threads."""
    a, b = _like(p, out), _like(q, out)
    rows = max(1, _CACHED // max(out.shape[1], 1))
    for begin in range(0, out.shape[0], rows):
        part = a[begin : begin + rows]
        product = part[:, 0:1] * b[:, 0]
        for k in range(1, p.shape[1]):
            product += part[:, k : k + 1] * b[:, k]
        out[begin : begin + rows] = product


def _views(shapes: Sequence[tuple[int, int]]) -> tuple[Factor, list[Factor]]:
    """A buffer for matrices of these shapes, and their places in it."""
    ends = np.cumsum([0, *(n * m for n, m in shapes)]).tolist()
    buffer = np.empty(ends[-1], np.float32)
    return buffer, [
        buffer[begin:end].reshape(shape) for begin, end, shape in zip(ends, ends[1:], shapes, strict=False)
    ]


def _like(array: Any, x: Any) -> Any:
    """`array` for arithmetic with `x`: the same memory, as a tensor if that is one."""
    return _tensor(array) if is_tensor(x) else array


def _tensor(array: Any) -> Any:
    import torch

    return torch.from_numpy(array)


def _is_finite(x: Any) -> bool:
    if is_tensor(x):
        return bool(x.isfinite().all())
    return bool(np.isfinite(np.asarray(x, np.float32)).all())


def _checked_gradient(x: Any, i: int) -> Any:
    name = f"gradients[{i}]"
    checks.buffer(x, name)
    if is_parameter(x):
        raise TypeError(f"`{name}` is a parameter: pass its gradient, `.grad`")
    dtype = _native.describe_buffer(x, name, False).dtype
    if dtype not in _DTYPES:
        raise TypeError(f"`{name}` is {dtype}: powersgd takes {', '.join(_DTYPES)}; convert it")
    if is_tensor(x):
        return x.detach()
    found = np.asarray(x)
    if not found.flags.writeable:
        raise ValueError(f"`{name}` is read-only, and its average is written there: pass a copy")
    return found


def chosen(
    codec: Codec | PowerSGD | str,
    error_feedback: ErrorFeedback | bool | None,
    comm: _native.Communicator,
    collective: str = "all_reduce",
) -> Codec | PowerSGD:
    """What `codec=` and `error_feedback=` ask for in a class that averages a model's gradients; residuals are
    apart from those of the communicator's other calls. Raises TypeError, ValueError."""
    if collective != "all_reduce":
        return with_residuals(resolve(codec, collective), error_feedback, comm)
    if isinstance(codec, PowerSGD):
        if error_feedback is not None:
            raise ValueError(f"error_feedback={error_feedback!r} beside a PowerSGD: pass it to that one")
        return codec
    if codec == PowerSGD.name:
        return PowerSGD(error_feedback=True if error_feedback is None else error_feedback)
    return with_residuals(resolve(codec, collective), error_feedback, comm)
