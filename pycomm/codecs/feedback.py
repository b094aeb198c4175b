"""Error feedback: what a codec lost is added to what is encoded next."""

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
Rule = Callable[[str, tuple[int, ...]], bool]
_WATCHED = 10  # steps
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def one_dimensional(name: str, shape: tuple[int, ...]) -> bool:
    """The rule that exempts biases and the gains of norms: small, and sensitive to what a codec loses."""
    return len(shape) <= 1


class ErrorFeedback:
    """The residuals of one rank: what its encodes lost, kept for the next call, a parameter at a time.

    Each encode of v = g + e sends Q(v) and leaves e = v - D(Q(v)), for every encode that the plan contains:
    the ones of a rank's own values, an owner's of the average, a ring's hops. So the errors of many steps
    cancel instead of adding up. (Seide et al., 1-bit stochastic gradient descent, Interspeech 2014;
    Karimireddy et al., Error feedback fixes signSGD, ICML 2019.)

    `exempt(name, shape)` says which tensors of a bucket or list are reduced as they are, uncompressed and
    without a residual: by default those of at most one dimension. A rule that also spares embeddings, whose
    rows seldom have a gradient and would be sent residuals long after: `lambda name, shape: len(shape) < 2 or
    "embed" in name`. It is asked by all_reduce alone, and not about an array by itself, which may well be
    many parameters laid flat.

    Residuals are float32, of as many elements as the parameter, in units of the sum over ranks with the loss
    scale divided out: set `scale` to the loss scale that the gradients of the next calls carry, whenever it
    changes. They belong to one communicator; each rank has its own object.

    A call whose result holds NaN or Inf leaves them untouched. All ranks see the same result of an
    all_reduce, so that all decide alike; a rank of a reduce_scatter sees its own part alone, so call skip()
    on all ranks when one of them found such a value, as for every other step that the optimizer leaves out.
    """

    def __init__(self, exempt: Rule = one_dimensional) -> None:
        if not callable(exempt):
            raise TypeError(f"`exempt` is {exempt!r}: pass a function of a name and a shape")
        self.exempt = exempt
        self._scale = 1.0
        self._calls: dict[tuple[Places, int], CallResiduals] = {}
        self._where: dict[str, CallResiduals] = {}
        self._loaded: dict[str, Residual] = {}
        self._to_watch = 0  # steps before what is left of these is thought to be misnamed
        self._of_torch = False
        self._round: set[str] = set()  # parameters that this step has had a call for
        self._of_round: list[CallResiduals] = []
        self._comm: weakref.ref[_native.Communicator] | None = None

    @property
    def scale(self) -> float:
        """The loss scale that the gradients of the next calls carry, the same on all ranks."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        found = checks.number(scale, "scale")
        if not _LEAST <= found <= _MOST:
            raise ValueError(f"`scale` is {found!r}: a loss scale is a positive number of float32's range")
        self._scale = found

    def skip(self) -> None:
        """Takes the last step's changes back: for a step whose result the optimizer does not use.

        A step is a round of calls in which no name comes twice. Called a second time it does nothing.
        """
        for of_call in self._of_round:
            of_call.settle()
            of_call.take_back()
        self._of_round.clear()
        self._round.clear()

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals by name, copied, 1-D, float32. Waits for calls that are under way.

        They are arrays, or torch's tensors if a call was about tensors: numpy.savez and pickle take both, and
        torch.load reads, by default, tensors alone.
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
        """Takes the place of all residuals: `state` is this rank's state_dict(), or a list of all old ranks'.

        The list is for another number of ranks: each of them gets the mean over the old ones, so that the
        mean over ranks, which is what an average still owes, stays as it was. Raises ValueError, and leaves
        all as it was, if the states of a list differ in names or lengths, or hold anything but finite 1-D
        arrays; or if calls have been made, and a name is of none of their parameters, or a length not that
        one's. Before the first call nobody knows of parameters: a name that no call is about in ten steps is
        then a warning, and its residual waits.
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
        """Which of these tensors are reduced as they are."""
        return [i for i, each in enumerate(zip(names, shapes, strict=True)) if self.exempt(*each)]

    def residuals(
        self, comm: _native.Communicator, places: Places, count: int, of_torch: bool
    ) -> CallResiduals:
        """The residuals for a call on `count` elements, of a tensor or array, with parameters at `places`.

        Nothing has changed until the call is known to have begun.
        """
        owner = self._comm and self._comm()
        if owner is not None and owner is not comm:
            raise ValueError(
                "this ErrorFeedback holds the residuals of another communicator: make one for each, on each"
                " rank; state_dict() and load_state_dict() take residuals along"
            )
        of_call = self._calls.get((places, count))
        if of_call is None:
            of_call = CallResiduals(places, count, of_torch)
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
        """A call begins with these residuals: it is what skip() may take back from now on."""
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

    def _watch_for_strangers(self, names: Iterable[str]) -> None:
        """Counts steps; after some of them, residuals that were loaded and not used may be misnamed.

        Before a call has begun: a warning may be an exception.
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
            f"the state that was loaded has residuals of {_some(self._loaded)}, which no call of the last"
            f" {_WATCHED} steps has used, while calls were about {_some(self._round)}: if those parameters"
            " have other names now, rename them in the state too, else delete them there. They are kept"
            " meanwhile",
            stacklevel=level + 1,
        )

    def _require_known(self, name: str, size: int) -> None:
        if not self._where:
            return
        source = self._where.get(name)
        if source is None and name not in self._loaded:
            raise ValueError(
                f"`state` holds a residual of {name!r}, which no call with this ErrorFeedback was about:"
                " leave it out, or load into a new ErrorFeedback"
            )
        known = self._loaded[name] if source is None else source.part(name)
        if known.size != size:
            raise ValueError(
                f"`state`: {name!r} has {known.size} elements here, and its residual {size}: the name is used"
                " twice"
            )

    def _find(self, name: str, of_call: CallResiduals) -> Residual | None:
        source = self._where.get(name)
        if source is not None:
            source.settle()
        found = self._loaded.get(name) if source is None else source.part(name)
        wanted = of_call.part(name).size
        if found is not None and found.size != wanted:
            raise ValueError(
                f"{name!r} has {wanted} elements here, and its residual {found.size}: one name cannot stand"
                " for two parameters, nor a state for two models"
            )
        return found


def _some(names: Collection[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _checked(name: str, residual: Any) -> Residual:
    if is_tensor(residual):
        residual = residual.detach().cpu()  # torch.load may put it elsewhere
    try:
        with np.errstate(over="ignore"):
            found = np.asarray(residual, np.float32)
    except (TypeError, ValueError):
        found = np.empty((), np.float32)
    if found.ndim != 1:
        raise ValueError(
            f"`state`: the residual of {name!r} is no 1-D array of numbers, as state_dict() gives"
        )
    if not np.isfinite(found).all():
        raise ValueError(f"`state`: the residual of {name!r} holds NaN or Inf, which no state_dict() gives")
    return found


class CallResiduals:
    """The residuals of one call, in the call's element order."""

    def __init__(self, places: Places, count: int, of_torch: bool) -> None:
        self.residuals = _native.Residuals(count)
        self.key = places, count
        self.places = places
        self.of_torch = of_torch
        self.holds = 0  # parameters whose residuals are here, and in no later object
        self._slices = {name: slice(begin, end) for name, begin, end in places}
        self._work: _native.Work | None = None

    def part(self, name: str) -> Residual:
        """A view, to use once settle() has returned."""
        return self.residuals.now[self._slices[name]]

    def start(self, work: _native.Work) -> None:
        """`work` is the last asynchronous call with these residuals; calls run in order."""
        self._work = work

    def let_go(self) -> None:
        """Of the work and its result, if it has ended."""
        if self._work is not None and self._work.is_completed():
            self._work = None

    def settle(self) -> None:
        """Waits until no call is under way. An error is left to whoever asks for the result."""
        work, self._work = self._work, None
        if work is not None:
            with contextlib.suppress(_native.CommError):
                work.wait()

    def take_back(self) -> None:
        self.residuals.take_back()


# Residuals of codecs that have no ErrorFeedback of their own: a parameter's, whatever codec carries it.
_kept: weakref.WeakKeyDictionary[_native.Communicator, ErrorFeedback] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def kept(comm: _native.Communicator) -> ErrorFeedback:
    """The residuals that live as long as the communicator does."""
    with _lock:
        return _kept.setdefault(comm, ErrorFeedback())
