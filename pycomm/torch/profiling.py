"""Calls as events in torch's profilers, named as those of torch's own backends are: "pycomm:all_reduce"."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.autograd import _record_function_with_args_enter as _enter
from torch.autograd import _record_function_with_args_exit as _exit

is_profiled = torch.autograd._profiler_enabled

_Method = TypeVar("_Method", bound=Callable[..., Any])


def recorded(name: str, passed: int = 0) -> Callable[[_Method], _Method]:
    """Decorates a method that returns a Handle: while a profiler is on, an event lasts from the call until
    it completes, and has the shapes of the tensors that the rank passes in, in the argument number `passed`.
    """

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **more: Any) -> Any:
            if not is_profiled():
                return method(self, *args, **more)
            event = _enter(f"pycomm:{name}", *_tensors(args[passed]) if len(args) > passed else ())
            try:
                handle = method(self, *args, **more)
            except BaseException:
                _exit(event)
                raise
            handle.when_complete(lambda: _exit(event))
            return handle

        return cast(_Method, call)

    return decorate


def _tensors(given: Any) -> list[Any]:
    if isinstance(given, torch.Tensor):
        return [given]
    return [tensor for each in given for tensor in _tensors(each)] if isinstance(given, list | tuple) else []
