"""Error feedback: what a codec lost is added to the next values that it encodes."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pycomm import _native, checks
from pycomm.gradients import is_tensor

Residual = npt.NDArray[np.float32]
Places = tuple[tuple[str, int, int], ...]  # name, begin, end: a parameter's elements in the data of a call
_Key = tuple[Places, int, Callable[[int], Any]]
Rule = Callable[[str, tuple[int, ...]], bool]
_WATCHED = 10  # steps
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def one_dimensional(name: str, shape: tuple[int, ...]) -> bool:
    """The rule that exempts biases and gains of norms: they are small, and sensitive to a codec's errors."""
    return len(shape) <= 1


class ErrorFeedback:
    """The residuals of one rank: what its encodes lost, kept for the next call, parameter by parameter.

    Each encode of v = g + e sends Q(v) and leaves e = v - D(Q(v)). This holds for every encode of the plan:
    those of a rank's own values, an owner's of the average, and those of a ring's hops. So the errors of many
    steps cancel instead of adding up. (Seide et al., 1-bit stochastic gradient descent, Interspeech 2014;
    Karimireddy et al., Error feedback fixes signSGD, ICML 2019.)

    `exempt(name, shape)` says which tensors of a bucket or list are reduced uncompressed and without a
    residual: by default those of at most one dimension. A rule that also exempts embeddings, whose rows
    seldom have a gradient and would get residuals long after:
    `lambda name, shape: len(shape) < 2 or "embed" in name`. Only all_reduce calls `exempt`, and not for a
    single array, which may be many parameters in one.

    Residuals are float32, with as many elements as the parameter, in units of the sum over ranks with the
    loss scale divided out: whenever the loss scale changes, set `scale` to that of the next gradients.
    Residuals belong to one communicator; each rank has its own object.

    A call whose result holds NaN or Inf leaves them unchanged. All ranks see the same result of an
    all_reduce, so all decide alike. A rank of a reduce_scatter sees only its own part, so call skip() on all
    ranks when one of them found such a value, as for every other step that the optimizer skips.
    """

    def __init__(self, exempt: Rule = one_dimensional) -> None:
        if not callable(exempt):
            raise TypeError(f"`exempt` is {exempt!r}: pass a function of a name and a shape")
        self.exempt = exempt
        self._scale = 1.0
        self._calls: dict[_Key, CallResiduals] = {}
        self._where: dict[str, CallResiduals] = {}
        self._loaded: dict[str, Residual] = {}
        self._to_watch = 0  # steps until unused ones of these are reported
        self._of_torch = False
        self._round: set[str] = set()  # parameters that were in a call of this step
        self._of_round: list[CallResiduals] = []
        self._comm: weakref.ref[_native.Communicator] | None = None

    @property
    def scale(self) -> float:
        """The loss scale of the gradients in the next calls, the same on all ranks."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        found = checks.number(scale, "scale")
        if not _LEAST <= found <= _MOST:
            raise ValueError(f"`scale` is {found!r}: a loss scale is a positive number in float32's range")
        self._scale = found

    def skip(self) -> None:
        """Undoes the changes of the last step: for a step whose result the optimizer does not use.

        A step is a series of calls in which no name occurs twice. A second skip() does nothing. But one after
        a step that has made no call, such as one without backward(), undoes the step before, which the
        optimizer has used: call skip() only after calls.
        """
        for of_call in self._of_round:
            of_call.settle()
            of_call.take_back()
        self._of_round.clear()
        self._round.clear()

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals by name, as 1-D float32 copies. Waits for calls in progress.

        They are NumPy arrays, or torch tensors if a call was made on tensors: numpy.savez and pickle accept
        both, but torch.load by default reads only tensors.
        """
        for of_call in self._calls.values():
            of_call.settle()
        found = {name: residual.copy() for name, residual in self._loaded.items()}
        found |= {name: of_call.part(name).copy() for name, of_call in self._where.items()}
        if not self._of_torch:
            return dict(found)
        import torch

        return {name: torch.from_numpy(residual) for name, residual in found.items()}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Replaces all residuals: `state` is this rank's state_dict(), or a list of those of all old ranks.

        The list is for another number of ranks: each rank gets the mean over the old ones, so that the mean
        over ranks, which is what an average still owes, stays the same. Raises ValueError, and changes
        nothing, if the states of a list differ in names or lengths, or hold anything but finite 1-D arrays;
        or if, after calls have been made, a name or a length does not match their parameters. Before the
        first call the parameters are unknown: a name that no call uses in ten steps is then a warning, and
        its residual is kept.
        """
        states: list[Any] = list(state) if isinstance(state, (list, tuple)) else [state]
        for each in states:
            if not isinstance(each, Mapping):
                kind = type(each).__name__
                raise TypeError(f"`state` is or holds a {kind}: pass a state_dict(), or a list of them")
        if not states:
            raise ValueError("`state` is an empty list: pass the state_dict() of every old rank")
        residuals: dict[str, Residual] = {}
        of_torch = self._of_torch
        for name in states[0]:
            if not isinstance(name, str):
                raise TypeError(f"`state` holds {name!r}: names are strings")
            given = [each[name] for each in states if name in each]
            found = [_checked(name, residual) for residual in given]
            if len(found) != len(states) or len({part.size for part in found}) != 1:
                raise ValueError(
                    f"`state`: the old ranks' residuals of {name!r} differ in length, or some have none"
                )
            self._require_known(name, found[0].size)
            residuals[name] = np.asarray(np.mean(found, axis=0, dtype=np.float64), np.float32)
            of_torch |= any(map(is_tensor, given))
        extra = set().union(*states) - set(residuals)
        if extra:
            raise ValueError(f"`state`: only some of the old ranks have a residual of {min(extra)!r}")
        for of_call in self._calls.values():
            of_call.settle()
        self._calls.clear()
        self._where.clear()
        self._of_round.clear()
        self._round.clear()
        self._loaded = residuals
        self._to_watch = _WATCHED
        self._of_torch = of_torch

    def __repr__(self) -> str:
        return f"<pycomm.codecs.ErrorFeedback of {len(self._where.keys() | self._loaded.keys())} parameters>"

    # ---- for the calls, which are native ----

    def exempted(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[int]:
        """Which of these tensors are reduced uncompressed."""
        return [i for i, each in enumerate(zip(names, shapes, strict=True)) if self.exempt(*each)]

    def residuals(
        self,
        comm: _native.Communicator,
        places: Places,
        count: int,
        of_torch: bool,
        make: Callable[[int], Any] = _native.Residuals,
    ) -> CallResiduals:
        """The residuals for a call on `count` elements of a tensor or array, with parameters at `places`.

        Nothing changes before begun() is called. `make(count)` makes what holds them, see CallResiduals.
        """
        owner = self._comm and self._comm()
        if owner is not None and owner is not comm:
            raise ValueError(
                "this ErrorFeedback holds the residuals of another communicator: make one for each, on each"
                " rank; state_dict() and load_state_dict() move residuals from one to the other"
            )
        of_call = self._calls.get((places, count, make))
        if of_call is None:
            of_call = CallResiduals(places, count, of_torch, make)
        of_call.let_go()
        self._watch_for_strangers(name for name, _, _ in places)
        moving = [name for name, _, _ in places if self._where.get(name) is not of_call]
        parts = {name: self._find(name, of_call) for name in moving}  # may raise
        if moving:
            of_call.settle()
        for name, part in parts.items():
            of_call.part(name)[:] = 0 if part is None else part
        return of_call

    def begun(self, comm: _native.Communicator, of_call: CallResiduals) -> None:
        """Records that a call begins with these residuals; skip() may undo it from now on."""
        self._comm = weakref.ref(comm)
        self._of_torch |= of_call.of_torch
        self._calls[of_call.key] = of_call
        names = [name for name, _, _ in of_call.places]
        for name in names:
            source = self._where.get(name)
            if source is of_call:
                continue
            self._loaded.pop(name, None)
            self._where[name] = of_call
            of_call.holds += 1
            if source is not None:
                source.holds -= 1
                if source.holds == 0:
                    del self._calls[source.key]
        if not self._round.isdisjoint(names):
            self._round.clear()
            self._of_round.clear()
        self._round.update(names)
        self._of_round.append(of_call)

    def begin_step(self) -> None:
        """For a caller that knows where a step begins: skip() undoes the calls from now on alone."""
        self._round.clear()
        self._of_round.clear()

    def owed(self, name: str) -> Residual | None:
        """A copy of what is owed of a parameter; None before a call about it."""
        source = self._where.get(name)
        if source is not None:
            source.settle()
        found = self._loaded.get(name) if source is None else source.part(name)
        return None if found is None else found.copy()

    def owe(self, name: str, residual: Residual | None) -> None:
        """Undoes the last call for one of its parameters, whose result nobody used: `residual` is what was
        owed before. One that is exempt is owed nothing."""
        source = self._where.get(name)
        if source is not None:
            source.settle()
            source.part(name)[:] = 0 if residual is None else residual

    def owe_more(self, name: str, average: Any, scale: float) -> None:
        """Adds the average of an earlier call, under this loss scale, that nobody used. Waits for the calls
        that have begun since."""
        source = self._where.get(name)
        if source is not None:
            source.settle()
            paid = average.detach().float().numpy() if is_tensor(average) else np.asarray(average, np.float32)
            source.part(name)[:] += paid.reshape(-1) / np.float32(scale)

    def _watch_for_strangers(self, names: Iterable[str]) -> None:
        """Counts steps; after some, warns of loaded residuals that no call has used, since they may be
        misnamed.

        It runs before a call begins, since the warning may be raised as an exception.
        """
        if self._to_watch == 0 or self._round.isdisjoint(names):
            return
        self._to_watch -= 1
        if self._to_watch > 0 or not self._loaded:
            return
        level = 1
        while sys._getframe(level).f_globals.get("__name__", "").startswith("pycomm."):
            level += 1
        warnings.warn(
            f"the loaded state has residuals of {_some(self._loaded)}, which no call of the last"
            f" {_WATCHED} steps has used; these calls had {_some(self._round)}. If those parameters"
            " have other names now, rename them in the state, else delete them there. They are kept"
            " meanwhile",
            stacklevel=level + 1,
        )

    def _require_known(self, name: str, size: int) -> None:
        if not self._where:
            return
        source = self._where.get(name)
        if source is None and name not in self._loaded:
            raise ValueError(
                f"`state` holds a residual of {name!r}, which no call with this ErrorFeedback has used:"
                " leave it out, or load into a new ErrorFeedback"
            )
        known = self._loaded[name] if source is None else source.part(name)
        if known.size != size:
            raise ValueError(
                f"`state`: {name!r} has {known.size} elements here, but its residual has {size}: the name is"
                " used twice"
            )

    def _find(self, name: str, of_call: CallResiduals) -> Residual | None:
        source = self._where.get(name)
        if source is not None:
            source.settle()
        found = self._loaded.get(name) if source is None else source.part(name)
        wanted = of_call.part(name).size
        if found is not None and found.size != wanted:
            raise ValueError(
                f"{name!r} has {wanted} elements here, but its residual has {found.size}: a name belongs to"
                " one parameter only, and a state to one model"
            )
        return found


def _some(names: Collection[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _checked(name: str, residual: Any) -> Residual:
    if is_tensor(residual):
        residual = residual.detach().cpu()  # torch.load may put it on another device
    try:
        with np.errstate(over="ignore"):
            found = np.asarray(residual, np.float32)
    except (TypeError, ValueError):
        found = np.empty((), np.float32)
    if found.ndim != 1:
        raise ValueError(
            f"`state`: the residual of {name!r} is not a 1-D array of numbers, as state_dict() gives"
        )
    if not np.isfinite(found).all():
        raise ValueError(f"`state`: the residual of {name!r} holds NaN or Inf, which no state_dict() gives")
    return found


class CallResiduals:
    """The residuals of one call, in the call's element order.

    `make(count)` returns what holds them: `now`, a float32 array of `count` elements, and take_back(), which
    undoes the last call's change.
    """

    def __init__(self, places: Places, count: int, of_torch: bool, make: Callable[[int], Any]) -> None:
        self.residuals = make(count)
        self.key = places, count, make
        self.places = places
        self.of_torch = of_torch
        self.holds = 0  # parameters whose latest residuals are in this object
        self._slices = {name: slice(begin, end) for name, begin, end in places}
        self._work: Any = None

    def part(self, name: str) -> Residual:
        """A view, to use once settle() has returned."""
        found: Residual = self.residuals.now[self._slices[name]]
        return found

    def start(self, work: Any) -> None:
        """`work` is the last asynchronous call with these residuals; calls run in order."""
        self._work = work

    def let_go(self) -> None:
        """Releases the work and its result, if it has ended."""
        if self._work is not None and self._work.is_completed():
            self._work = None

    def settle(self) -> None:
        """Waits until no call is in progress. An error is left to whoever asks for the result."""
        work, self._work = self._work, None
        if work is not None:
            with contextlib.suppress(_native.CommError):
                work.wait()

    def take_back(self) -> None:
        self.residuals.take_back()


# Residuals for codecs without an ErrorFeedback of their own: they belong to a parameter, not to a codec.
_kept: weakref.WeakKeyDictionary[_native.Communicator, ErrorFeedback] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def kept(comm: _native.Communicator) -> ErrorFeedback:
    """The residuals that live as long as the communicator does."""
    with _lock:
        return _kept.setdefault(comm, ErrorFeedback())
