"""What compress() returns for any kind of parallel model: settings, residuals in checkpoints, bytes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from pycomm import Communicator
from pycomm.codecs.feedback import ErrorFeedback, Rule
from pycomm.codecs.kinds import Codec, feedback_of, wire_bytes
from pycomm.codecs.powersgd import PowerSGD, chosen

_STEPS = 1 << 32  # steps of a codec's random bits
_KEYS = {"calls", "residuals", "factors"}
_KEEPERS = ErrorFeedback, PowerSGD
_holders: weakref.WeakKeyDictionary[ErrorFeedback | PowerSGD, weakref.ref[Compression]]
_holders = weakref.WeakKeyDictionary()


class Traffic(NamedTuple):
    """What this rank's gradients came to so far: encoded once each, and without a codec, in bytes."""

    sent: int
    uncompressed: int


class Compression:
    """A model's compression, which compress() has registered.

    Its checkpoints are of each rank: residuals by the names of parameters, 1-D float32 of each parameter's
    elements, whether the model is sharded or not.
    """

    def __init__(
        self,
        comm: Communicator,
        parameters: Mapping[str, Any],
        codec: Codec | PowerSGD | str,
        error_feedback: ErrorFeedback | bool | None,
        exempt: Iterable[str] | Rule,
        collective: str,
    ) -> None:
        self._comm = comm
        self._shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        self._codec = chosen(codec, error_feedback, comm, collective)
        if isinstance(self._codec, PowerSGD):
            self._feedback = self._codec.error_feedback
        else:
            self._feedback = feedback_of(self._codec, comm)
        rules = [_rule(exempt, self._shapes)]
        if self._feedback is not None:
            passed = error_feedback, getattr(codec, "error_feedback", None)
            if any(each is self._feedback for each in passed):
                rules.append(self._feedback.exempt)
            else:
                self._feedback.exempt = lambda name, shape: False  # which `exempt` has decided
        self._compressed = {
            name for name, shape in self._shapes.items() if not any(rule(name, shape) for rule in rules)
        }
        for name, p in parameters.items():
            if name in self._compressed and p.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise TypeError(
                    f"parameter {name!r} is {p.dtype}, and codecs carry float32, float16 and bfloat16:"
                    " convert the model, or name the parameter in `exempt`"
                )
        if not self._compressed:
            raise ValueError(
                f"`exempt` leaves none of {len(self._shapes)} parameters to be compressed, with the rule of"
                " an ErrorFeedback if one was passed"
            )
        self._calls = 0
        self._sent = self._uncompressed = 0

    @property
    def error_feedback(self) -> ErrorFeedback | None:
        """What keeps the residuals: set its `scale` to the loss scale before each backward(), and call its
        `skip()` for a step of finite averages that the optimizer leaves out. It undoes the last backward()
        that has sent: call it only after one of that step. None without error feedback."""
        return self._feedback

    @property
    def traffic(self) -> Traffic:
        """Bytes so far. How often an algorithm encodes and sends them on is not counted."""
        return Traffic(self._sent, self._uncompressed)

    def state_dict(self) -> dict[str, Any]:
        """What this rank's later run needs, between steps: torch.load reads it. A collective call of sharded
        models."""
        factors = self._codec.factors if isinstance(self._codec, PowerSGD) else {}
        return {"calls": self._calls, "residuals": self._residuals(), "factors": factors}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Goes on where state_dict() was called. `state` is this rank's, or for another number of ranks the
        list of those of all old ranks, whose residuals' mean is kept.

        Raises ValueError, and changes nothing, for a state of other parameters, and for one with residuals
        where there is no error feedback.
        """
        states: list[Any] = list(state) if isinstance(state, (list, tuple)) else [state]
        if not states or not all(isinstance(each, Mapping) and each.keys() >= _KEYS for each in states):
            raise ValueError("`state` is not a Compression's: pass a state_dict(), or a list of them")
        for name, residual in ((n, r) for each in states for n, r in each["residuals"].items()):
            size = math.prod(self._shapes[name]) if name in self._compressed else 0
            if len(residual) != size:
                raise ValueError(
                    f"`state` has a residual of {name!r} of {len(residual)} elements, and here {size} of that"
                    " name are compressed: load the state of this model, with the same `exempt`"
                )
        if self._feedback is None and any(each["residuals"] for each in states):
            raise ValueError(
                "`state` has residuals, and here is no error feedback that would pay them: pass"
                ' error_feedback=True to compress(), or leave the state\'s "residuals" empty'
            )
        if isinstance(self._codec, PowerSGD):
            self._codec.load_state_dict(states)
        elif self._feedback is not None:
            self._load_residuals([each["residuals"] for each in states])
        self._calls = int(states[0]["calls"])

    def __repr__(self) -> str:
        return f"<pycomm.torch.Compression by {self._codec.name} of {len(self._compressed)} parameters>"

    # ---- for the kinds of models ----

    def _hold(self) -> None:
        """Takes what keeps residuals and factors, by names that another model may have as well."""
        keepers = [each for each in (self._codec, self._feedback) if isinstance(each, _KEEPERS)]
        for keeper in keepers:
            holder = _holders.get(keeper)
            if holder is not None and holder() is not None:
                raise ValueError(
                    f"this {type(keeper).__name__} has what another model is owed, of an earlier compress():"
                    " make one for each model"
                )
        for keeper in keepers:
            _holders[keeper] = weakref.ref(self)

    def _residuals(self) -> dict[str, Any]:
        return {} if self._feedback is None else self._feedback.state_dict()

    def _load_residuals(self, residuals: list[Mapping[str, Any]]) -> None:
        assert self._feedback is not None
        self._feedback.load_state_dict(residuals)

    def _next_step(self) -> int:
        """A number for the random bits of a call, equal on all ranks, and in a run that is resumed."""
        self._calls += 1
        return self._calls % _STEPS

    def _count(self, compressed: Iterable[Any], uncompressed: Iterable[Any]) -> None:
        for x in compressed:
            if isinstance(self._codec, PowerSGD):
                whole = x.nbytes
                self._sent += int(min(self._codec.wire_bytes(tuple(x.shape)), whole))
            else:
                self._sent += wire_bytes(self._codec, x.numel())
            self._uncompressed += x.nbytes
        for x in uncompressed:
            self._sent += x.nbytes
            self._uncompressed += x.nbytes


def _rule(exempt: Iterable[str] | Rule, shapes: Mapping[str, Any]) -> Rule:
    if callable(exempt):
        return exempt
    if isinstance(exempt, str):
        raise TypeError(f"`exempt` is {exempt!r}: pass a list of names and patterns, or a function")
    patterns = list(exempt)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"`exempt` holds {pattern!r}: names and patterns are strings")
        if not any(fnmatchcase(name, pattern) for name in shapes):
            raise ValueError(
                f"`exempt` holds {pattern!r}, which matches no parameter: names are as in"
                f" named_parameters(), the first is {next(iter(shapes), None)!r}"
            )
    return lambda name, shape: any(fnmatchcase(name, pattern) for pattern in patterns)
