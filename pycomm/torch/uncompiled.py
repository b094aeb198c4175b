"""What torch.compile leaves alone."""

from __future__ import annotations

from contextlib import suppress
from types import FunctionType
from typing import TypeVar

T = TypeVar("T", bound=type)


def uncompiled(cls: T) -> T:
    """A class whose methods, and what these call, run as they are.

    C++ calls them in the middle of a function that is being compiled, as in the forward pass of DDP; the
    compiler would take them for a part of it. torch.compiler.disable would import the compiler, which takes
    seconds, and wrap each method.
    """
    with suppress(ImportError):  # a torch that keeps this elsewhere
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

        for method in vars(cls).values():
            if isinstance(method, FunctionType):
                set_code_exec_strategy(
                    method.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
                )
    return cls
