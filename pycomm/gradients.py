"""Which tensors a bucket copies now: zero_grad() replaces the gradient of a parameter by another tensor."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

_SHOWN = 3  # names in a message


def is_tensor(x: Any) -> bool:
    """Whether `x` is a torch tensor. Whoever passes one has imported torch, so this need not import it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_parameter(x: Any) -> bool:
    """Whether backward() gives `x` a gradient: it is a torch Parameter, frozen or not, or another leaf."""
    if not is_tensor(x):
        return False
    torch = sys.modules["torch"]
    return isinstance(x, torch.nn.Parameter) or bool(x.requires_grad and x.is_leaf)


def itself(x: Any) -> Any:
    """`x` for a bucket that copies its own elements, even if it is a parameter."""
    return x.detach() if is_tensor(x) else x


def _tells(x: Any) -> bool:
    """Whether `x` knows its number of references: those to the tensor, not to its memory."""
    return is_tensor(x) and hasattr(x, "_use_count")


class Gradients:
    """The tensors of a bucket, in which the gradients take the place of the parameters.

    For a tensor that is no parameter, torch counts the references that it holds besides Python's. If there
    were any when the bucket got the tensor or in the last call, and now there are none, it was a gradient
    that its parameter has dropped.
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
        """The tensors to copy from or to now. Raises before anything has changed."""
        missing = [i for i in self._parameters if self.given[i].grad is None]
        if missing:
            self._refuse_frozen()
            if not self._missing_as_zero:
                raise ValueError(
                    f"no gradient, `.grad` is None: {self._shown(missing)}; pack after backward(), leave them"
                    " out, or make the Bucket with missing_as_zero=True (for parameters'"
                    " own values, make it of x.detach())"
                )
        held = self._held_now()
        dropped = sorted(self._held - held)
        if dropped:
            raise ValueError(
                f"no longer a parameter's gradient: {self._shown(dropped)}; zero_grad(), for example, has"
                " dropped it. Make the bucket from the parameters, Bucket(model.parameters()), to look"
                " up their gradients in every call, or set bucket.tensors to the current tensors"
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
                f"frozen (requires_grad=False), hence without gradient: {self._shown(frozen)}; leave it out,"
                " or pass x.detach() to pack a parameter's own values"
            )

    def _held_now(self) -> set[int]:
        return {i for i in self._others if self.given[i]._use_count() > 1}

    def _shown(self, indices: list[int]) -> str:
        shown = [repr(self._names[i]) if self._names else f"`tensors[{i}]`" for i in indices[:_SHOWN]]
        rest = len(indices) - len(shown)
        return ", ".join(shown) + (f" (and {rest} more)" if rest else "")
