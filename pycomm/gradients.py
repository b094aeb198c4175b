"""Which tensors a bucket copies now: a parameter's gradient is another tensor after every zero_grad()."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

_SHOWN = 3  # names in a message


def is_tensor(x: Any) -> bool:
    """Whether `x` is torch's. Whoever passes one has imported torch; we need not."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_parameter(x: Any) -> bool:
    """Whether `x` is what backward() gives a gradient: torch's Parameter, frozen or not, or another leaf."""
    if not is_tensor(x):
        return False
    torch = sys.modules["torch"]
    return isinstance(x, torch.nn.Parameter) or bool(x.requires_grad and x.is_leaf)


def itself(x: Any) -> Any:
    """`x` for a bucket that shall copy its elements, whatever it is."""
    return x.detach() if is_tensor(x) else x


def _tells(x: Any) -> bool:
    """Whether `x` tells how many hold it: the tensor, not its memory."""
    return is_tensor(x) and hasattr(x, "_use_count")


class Gradients:
    """The tensors that a bucket was given, with the gradients in the parameters' places.

    Of a tensor that is no parameter torch tells how many hold it besides Python. If somebody did when the
    bucket got it or in the last call, and nobody does now, it was a gradient that its parameter has dropped.
    """

    def __init__(self, given: Sequence[Any], names: Sequence[str] | None, missing_as_zero: bool) -> None:
        self.given = list(given)
        self._names = names
        self._missing_as_zero = missing_as_zero
        self._parameters = [i for i, x in enumerate(self.given) if is_parameter(x)]
        self._refuse_frozen()
        parameters = set(self._parameters)
        self._others = [i for i, x in enumerate(self.given) if i not in parameters and _tells(x)]
        self._held = self._held_now()

    def now(self) -> list[Any]:
        """What to copy from or to at this moment. Raises before anything has changed."""
        missing = [i for i in self._parameters if self.given[i].grad is None]
        if missing:
            self._refuse_frozen()
            if not self._missing_as_zero:
                raise ValueError(
                    f"no gradient, `.grad` is None: {self._shown(missing)}; pack after backward(), leave out"
                    " what takes no part in it, or make the Bucket with missing_as_zero=True (for parameters'"
                    " own values make it of x.detach())"
                )
        held = self._held_now()
        dropped = sorted(self._held - held)
        if dropped:
            raise ValueError(
                f"no parameter's gradient any more: {self._shown(dropped)}; zero_grad(), say, has dropped"
                " what the bucket has. Make it from the parameters, Bucket(model.parameters()), which looks"
                " for their gradients in every call, or set bucket.tensors to the tensors that are meant"
            )
        self._held = held
        for i in missing:
            self.given[i].grad = self.given[i].new_zeros(self.given[i].shape)
        if not self._parameters:
            return self.given
        found = self.given.copy()
        for i in self._parameters:
            found[i] = found[i].grad
        return found

    def _refuse_frozen(self) -> None:
        indexed = [(i, self.given[i]) for i in self._parameters]
        frozen = [i for i, x in indexed if x.grad is None and not x.requires_grad]
        if frozen:
            raise ValueError(
                f"frozen, requires_grad=False, so without gradient: {self._shown(frozen)}; leave it out,"
                " or pass x.detach() to pack a parameter's own values"
            )

    def _held_now(self) -> set[int]:
        return {i for i in self._others if self.given[i]._use_count() > 1}

    def _shown(self, indices: list[int]) -> str:
        shown = [repr(self._names[i]) if self._names else f"`tensors[{i}]`" for i in indices[:_SHOWN]]
        rest = len(indices) - len(shown)
        return ", ".join(shown) + (f" (and {rest} more)" if rest else "")
