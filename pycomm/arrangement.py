"""Gradients in buckets: which go together, where each one lies, and the way there and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pycomm import _native, checks
from pycomm.bucket import Bucket
from pycomm.gradients import is_parameter, is_tensor
from pycomm.group import Communicator
from pycomm.stats import Stats

_FIRST_BUCKET = 1 << 20  # bytes: full soon after backward() begins


class Gradient:
    """One of a reducer's gradients: that of a torch parameter, an array or tensor, or of a shape, for which
    this makes an array."""

    def __init__(self, given: Any, name: str, dtype: Any) -> None:
        self.name = name
        self.of_shape = isinstance(given, (int, np.integer, tuple, list)) and not isinstance(given, bool)
        if self.of_shape:
            shape = tuple(given) if isinstance(given, (tuple, list)) else (given,)
            if any(checks.integer(n, "gradients") < 0 for n in shape):
                raise ValueError(f"`gradients` holds the shape {given!r}: lengths are 0 or more")
            given = np.zeros(shape, _native.numpy_dtype(_native.packable_dtype(dtype or "float32")[0]))
        self.of_parameter = is_parameter(given)
        self.given = given  # parameter, array or tensor
        self.view: Any = None  # its place in the bucket, if that is where it shall lie
        if self.of_parameter and not given.is_contiguous():
            raise ValueError(
                f"parameter {name!r} is not contiguous: before you make the GradientReducer, call"
                " model.to(memory_format=torch.contiguous_format)"
            )
        if isinstance(given, np.ndarray) and not given.flags.writeable:
            raise ValueError(f"gradient {name!r} is read-only, and its average is written there: pass a copy")

    @property
    def value(self) -> Any:
        return self.given.grad if self.of_parameter else self.given

    def require(self) -> None:
        """Raises ValueError if backward() has left nothing here that can be packed."""
        x = self.value
        if x is None:
            raise ValueError(f"gradient {self.name!r} is not there, `.grad` is None: call unused() for it")
        if getattr(x, "is_sparse", False):
            raise ValueError(
                f"gradient {self.name!r} is sparse: make the layer with dense gradients (sparse=False)"
            )
        if self.of_parameter and not x.is_contiguous():
            self.given.grad = x.contiguous()

    @property
    def lies_in_bucket(self) -> bool:
        """Asks for the address: `.grad.data = ...` and model.to() give the same object other memory."""
        x = self.value
        if self.view is None or x is None:
            return False
        if self.of_shape:
            return x is self.view
        return bool(x.data_ptr() == self.view.data_ptr() and x.dtype == self.view.dtype)

    def lay_in_bucket(self) -> None:
        """Makes a parameter's gradient what the bucket holds, if it may lie there: a tensor of its own, so
        that what is done to that tensor leaves the view alone."""
        if self.of_parameter and self._may_lie_there and not self.lies_in_bucket:
            self.given.grad = self.view.detach()

    @property
    def _may_lie_there(self) -> bool:
        return self.view is not None and bool(self.given.dtype == self.view.dtype)

    def forget(self) -> None:
        """No rank has used it: the optimizer shall leave its parameter out."""
        if self.of_parameter:
            self.given.grad = None

    def zero(self) -> None:
        """Makes it zero, if it is there; a parameter without one keeps none."""
        x = self.value
        if x is None:
            return
        if is_tensor(x):
            x.detach().zero_()
        else:
            x[...] = 0

    def leave_out(self) -> None:
        """Counts as zeros in this step."""
        if self.of_parameter and not self._may_lie_there:
            self.given.grad = None  # the bucket puts zeros in its place
            return
        self.lay_in_bucket()
        self.zero()


class Arrangement:
    """Buckets of gradients, filled in this order. A collective call: the same on all ranks.

    A bucket holds gradients of one type, as many as fit `bucket_bytes`, at least one; the first bucket holds
    1 MiB. With `as_views` the gradients of shapes lie in the buckets, and those of parameters come to lie
    there in take().
    """

    def __init__(
        self,
        gradients: Sequence[Gradient],
        order: Sequence[int],
        *,
        comm: Communicator,
        dtype: Any,
        bucket_bytes: float,
        as_views: bool,
    ) -> None:
        self._gradients = gradients
        self.order = list(order)
        self.members = self._filled(dtype, bucket_bytes)  # of each bucket
        self.bucket_of = {i: bucket for bucket, members in enumerate(self.members) for i in members}
        self.buckets = [
            Bucket(
                [gradients[i].given for i in members],
                dtype=dtype,
                comm=comm,
                names=[gradients[i].name for i in members],
                missing_as_zero=True,
            )
            for members in self.members
        ]
        if as_views:
            self._use_views()

    def pack(self, bucket: int, scale: float) -> None:
        """Brings the bucket's gradients there, each value times `scale`."""
        if scale != 1 or not all(self._gradients[i].lies_in_bucket for i in self.members[bucket]):
            self.buckets[bucket].pack(scale)

    def cosine(self) -> float:
        """Of the angle between all gradients as they are and what the buckets hold; NaN if one is zero."""
        product = here = there = 0.0
        for bucket, members in zip(self.buckets, self.members, strict=True):
            for i, view in zip(members, bucket.views, strict=True):
                value = self._gradients[i].value
                if value is None:
                    continue
                a, b = _as_float64(value), _as_float64(view)
                product += float(a @ b)
                here += float(a @ a)
                there += float(b @ b)
        return product / math.sqrt(here * there) if here * there > 0 else math.nan

    def take(self, scale: float) -> Stats:
        """Brings what the buckets hold to the gradients, each value times `scale`."""
        for gradient in self._gradients:
            gradient.lay_in_bucket()
        found = [bucket.unpack(scale) for bucket in self.buckets]
        self._are_finite = [stats.finite for stats in found]
        return Stats(
            math.fsum(stats.sum_squares for stats in found),
            max((stats.max_abs for stats in found), default=0.0),
            sum(stats.nans for stats in found),
            sum(stats.infs for stats in found),
        )

    def is_finite(self, i: int) -> bool:
        """Whether the last take() found no NaN and no Inf in the bucket of gradient `i`."""
        return self._are_finite[self.bucket_of[i]]

    def average(self, i: int) -> Any:
        """What the bucket holds of gradient `i`."""
        bucket = self.bucket_of[i]
        return self.buckets[bucket].views[self.members[bucket].index(i)]

    def _filled(self, dtype: Any, bucket_bytes: float) -> list[list[int]]:
        members: list[list[int]] = []
        kind, room = "", 0.0
        for i in self.order:
            of = _native.describe_buffer(self._gradients[i].given, f"gradients[{i}]", False)
            name, itemsize = _native.packable_dtype(of.dtype, f"gradients[{i}]")
            if dtype is not None:
                name, itemsize = _native.packable_dtype(dtype)
            size = of.count * itemsize
            if name != kind or size > room:
                kind, room = name, min(bucket_bytes, _FIRST_BUCKET) if not members else bucket_bytes
                members.append([])
            members[-1].append(i)
            room -= size
        return members

    def _use_views(self) -> None:
        for bucket, members in zip(self.buckets, self.members, strict=True):
            for i, view in zip(members, bucket.views, strict=True):
                gradient = self._gradients[i]
                if gradient.of_shape:
                    gradient.given = gradient.view = view
                elif gradient.of_parameter and gradient.given.dtype == view.dtype:
                    moves = gradient.lies_in_bucket  # in one of the last arrangement
                    if moves:
                        view.copy_(gradient.view)
                    gradient.view = view
                    if moves:
                        gradient.lay_in_bucket()
            bucket.tensors = [self._gradients[i].given for i in members]


def _as_float64(x: Any) -> Any:
    return x.detach().double().reshape(-1) if is_tensor(x) else np.asarray(x, np.float64).reshape(-1)
