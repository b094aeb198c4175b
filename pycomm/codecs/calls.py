"""What becomes of comm.all_reduce(x, codec=...): arrays, buckets and lists, residuals, asynchronous calls."""

from __future__ import annotations

import contextlib
import difflib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from pycomm import _native, checks
from pycomm.bucket import Bucket, Segment
from pycomm.codecs.feedback import ErrorFeedback, Layout, Places
from pycomm.codecs.kinds import DEFAULTS, BlockCodec, Codec, SharedInt, TopK
from pycomm.gradients import is_tensor, itself
from pycomm.layouts import signature

_ALL_REDUCE_ALONE = (SharedInt, TopK)


def call(
    comm: _native.Communicator,
    collective: str,
    x: Any,
    *,
    codec: Codec | str,
    step: int | None = None,
    op: Any = "sum",
    out: Any = None,
    algorithm: str | None = None,
    deterministic: bool = False,
    counts: Sequence[int] | None = None,
    timeout: float | None = None,
    tag: str | None = None,
    async_op: bool = False,
    stream: Any = None,
) -> Any:
    """What comm.all_reduce, reduce_scatter and all_gather do when they are given a codec.

    `x`: an array or tensor of float32, float16 or bfloat16, a pycomm.Bucket, or, for all_reduce, a list of
    arrays and tensors, which is packed into a bucket for each dtype. `step`: a number of 32 bits that
    stochastic rounding depends on, the same on all ranks; comm.codec_step, which counts, by default. Other
    arguments and errors are those of comm.all_reduce. TypeError for an operator other than "sum" and "avg",
    and for other dtypes; ValueError where residuals are to be kept and nothing names them.
    """
    chosen = _resolve(codec)
    if not isinstance(op, str) or op not in ("sum", "avg"):
        raise TypeError(
            f"`op` is {op!r}: calls with a codec take 'sum' and 'avg'; leave `codec` out for others"
        )
    if step is not None and not 0 <= checks.integer(step, "step") < 1 << 32:
        raise ValueError(f"`step` is {step!r}: a number of 32 bits")
    if tag is not None and not isinstance(tag, str):
        raise TypeError(f"`tag` is a {type(tag).__name__}: pass a string")
    if stream is not None:
        raise ValueError("`stream` is for GPU buffers: CPU buffers have none, leave it out")
    if collective != "all_reduce" and isinstance(chosen, _ALL_REDUCE_ALONE):
        others = [name for name, each in DEFAULTS.items() if not isinstance(each, _ALL_REDUCE_ALONE)]
        raise ValueError(f"{collective} cannot carry {chosen.name}, all_reduce can: pass {', '.join(others)}")
    if isinstance(chosen, TopK) and (algorithm is not None or deterministic):
        given = f"algorithm={algorithm!r}" if algorithm is not None else "deterministic=True"
        raise ValueError(f"{given}: topk is an all_gather of records, summed in rank order; leave it out")
    request = _Request(
        comm,
        collective,
        chosen,
        {"step": step, "op": op, "timeout": timeout, "async_op": bool(async_op)},
        {"algorithm": algorithm, "deterministic": bool(deterministic), "counts": counts},
        tag,
    )
    return request.run_list(x, out) if isinstance(x, (list, tuple)) else request.run(x, out)


@dataclass(frozen=True)
class _Request:
    """A call but for its buffers."""

    comm: _native.Communicator
    collective: str
    codec: Codec
    common: Mapping[str, Any]  # arguments that every native call takes
    special: Mapping[str, Any]  # ones that some take
    tag: str | None

    def run(self, x: Any, out: Any) -> Any:
        return self.prepare(x, out)()

    def prepare(self, x: Any, out: Any) -> Callable[[], Any]:
        """Makes the call when it is called. What raises before that, here, has changed nothing."""
        _carried_dtype(x, "x")
        feedback = _feedback_of(self.codec, self.comm)
        segments = x.segments if isinstance(x, Bucket) else None
        if feedback is None:
            return lambda: self._start(x, out, segments)
        places = _places(x, self.tag, self.codec)
        exempt = None
        if isinstance(x, Bucket) and self.collective == "all_reduce":
            exempt = _Exempt.of(x, out, feedback, [name for name, _, _ in places])
        if exempt is not None:
            places = tuple(place for place in places if place[0] not in exempt.names)
            segments = [segment for segment in x.segments if segment not in exempt.segments]
            if not segments:
                return lambda: self._reduce_plainly(x, out)
        layout = feedback.layout(self.comm, places, _count(x), is_tensor(_data(x)))
        return partial(self._run_fed, x, out, segments, exempt, feedback, layout)

    def _run_fed(
        self,
        x: Any,
        out: Any,
        segments: Sequence[Any] | None,
        exempt: _Exempt | None,
        feedback: ErrorFeedback,
        layout: Layout,
    ) -> Any:
        residuals = {
            "residual": layout.now,
            "next_residual": layout.next,
            "residual_scale": float(feedback.scale),
        }
        result = None
        if exempt is not None:
            exempt.take()
            if isinstance(self.codec, TopK):
                # It knows no segments: what is exempt must not be among the largest.
                x, out, result = exempt.left_out(), None, out
        try:
            works = [self._start(x, out, segments, **residuals)]
        except (TypeError, ValueError):  # refused: nothing has moved
            if exempt is not None:
                exempt.put()
            raise
        except BaseException:
            feedback.begun(self.comm, layout)
            raise
        feedback.begun(self.comm, layout)
        if exempt is not None:
            works.append(self._reduce_plainly(exempt, None))

        def finish(_: Any = None) -> Any:
            found = works[0].wait() if self.common["async_op"] else works[0]
            found = found if result is None else result
            if exempt is not None:
                exempt.put()
            layout.end(_is_finite(found))
            return found

        if not self.common["async_op"]:
            return finish()
        work = CodecWork(works, finish)
        layout.start(work.settle)
        return work

    def run_list(self, xs: Sequence[Any], out: Any) -> Any:
        """One call for each dtype."""
        if self.collective != "all_reduce":
            raise TypeError(f"`x` is a list: {self.collective} takes one buffer")
        outs = xs if out is None else out
        if not isinstance(outs, (list, tuple)):
            raise TypeError(f"`out` is a {type(outs).__name__}: for a list pass a list as long")
        if len(outs) != len(xs):
            raise ValueError(f"`out` has {len(outs)} buffers for {len(xs)}")
        if _feedback_of(self.codec, self.comm) is not None:
            _needed(self.tag, self.codec)
        of_dtype: dict[str, list[int]] = {}
        for i, x in enumerate(xs):
            of_dtype.setdefault(_carried_dtype(x, f"x[{i}]"), []).append(i)
        buckets = []
        for dtype, indices in of_dtype.items():
            names = [f"{self.tag or ''}[{i}]" for i in indices]
            bucket = Bucket([itself(xs[i]) for i in indices], names=names)
            bucket.pack()
            for i in indices:
                if _carried_dtype(outs[i], f"out[{i}]") != dtype:
                    raise TypeError(f"`out[{i}]` is not of x's dtype, {dtype}")
                shape, wanted = (_native.describe_buffer(each[i], "x")[1] for each in (outs, xs))
                if shape != wanted:
                    raise ValueError(
                        f"`out[{i}]` has shape {tuple(shape)} where `x[{i}]` has {tuple(wanted)}"
                    )
            bucket.tensors = [itself(outs[i]) for i in indices]
            bucket.check_unpack()
            buckets.append(bucket)
        starts = [self.prepare(bucket, None) for bucket in buckets]
        works = [start() for start in starts]

        def finish(_: Any) -> Any:
            for bucket in buckets:
                bucket.unpack()
            return outs

        return CodecWork(works, finish) if self.common["async_op"] else finish(None)

    def _reduce_plainly(self, x: Any, out: Any) -> Any:
        given = {**self.common, **self.special}
        common = {name: value for name, value in given.items() if name != "step" and value is not None}
        if out is not None:
            common["out"] = out
        if self.tag is not None:
            common["tag"] = self.tag
        return self.comm.all_reduce(x, **common)

    def _start(self, x: Any, out: Any, segments: Sequence[Any] | None, **residuals: Any) -> Any:
        arguments = {"out": out, "tag": self.tag, **self.common, **residuals}
        if isinstance(self.codec, TopK):
            del arguments["step"]  # it has nothing random
            count = _count(x) if segments is None else sum(s.end - s.begin for s in segments)
            return _native.run_topk(self.comm, x, self.codec.kept(count), **arguments)
        arguments["segments"] = segments
        if isinstance(self.codec, SharedInt):  # exact sums are deterministic, whether asked for or not
            arguments |= {"seed": self.codec.seed, "algorithm": self.special["algorithm"]}
            return _native.run_shared_int(self.comm, x, self.codec.width, **arguments)
        assert isinstance(self.codec, BlockCodec)
        arguments |= self.special
        return _native.run_codec(self.comm, self.collective, x, self.codec.native(), **arguments)


class _Exempt:
    """The tensors of a bucket that error feedback exempts, copied to a buffer of their own and back.

    It is what they are reduced in, and has of a bucket what that takes: there is one for every call.
    """

    def __init__(self, x: Bucket, out: Any, chosen: list[tuple[str, Segment]]) -> None:
        self.names = frozenset(name for name, _ in chosen)
        self.segments = frozenset(segment for _, segment in chosen)
        self._x, self._out = x, out
        target = x if out is None else out
        dtype, shape = _native.describe_buffer(target, "x" if out is None else "out", writable=True)
        wanted = _carried_dtype(x, "x")
        if dtype != wanted:
            raise TypeError(f"`out` is {dtype} where `x` is {wanted}")
        if math.prod(shape) != _count(x):
            raise ValueError(f"`out` has {math.prod(shape)} elements where `x` has {_count(x)}")
        self._places = [(segment.begin, segment.end) for _, segment in chosen]
        self._counts = [end - begin for begin, end in self._places]
        *self._offsets, total = accumulate(self._counts, initial=0)
        data = x.data
        self._own = data.new_zeros(total) if is_tensor(data) else np.zeros(total, data.dtype)
        self.__pycomm_signature__ = f"exempt {signature([name for name, _ in chosen], self._counts)}"

    @classmethod
    def of(cls, x: Bucket, out: Any, feedback: ErrorFeedback, names: Sequence[str]) -> _Exempt | None:
        tensors = zip(names, x.segments, x.views, strict=True)
        chosen = [
            (name, segment) for name, segment, view in tensors if feedback.exempt(name, tuple(view.shape))
        ]
        return cls(x, out, chosen) if chosen else None

    @property
    def __pycomm_buffer__(self) -> Any:
        return self._own

    def take(self) -> None:
        _native.pack(self._own, self._parts(self._x), self._offsets, self._counts, stats=False)

    def left_out(self) -> Any:
        """Where the result will be, holding x with zeros in their place."""
        result = self._x if self._out is None else self._out
        if self._out is not None:
            _native.pack(_data(result), [self._x.data], [0], [_count(self._x)], stats=False)
        for part in self._parts(result):
            part[:] = 0
        return result

    def put(self) -> None:
        target = self._x if self._out is None else self._out
        _native.unpack(self._own, self._parts(target), self._offsets, self._counts, stats=False)

    def _parts(self, of: Any) -> list[Any]:
        data = _data(of)
        flat = (data if is_tensor(data) else np.asarray(data)).reshape(-1)
        return [flat[begin:end] for begin, end in self._places]


class CodecWork:
    """An asynchronous call with a codec, with the methods of pycomm.Work.

    Part of it may be done only when it is waited for: the buffers hold the result once a method has said so.
    """

    def __init__(self, works: Sequence[Any], finish: Callable[[Any], Any]) -> None:
        self._works = works
        self._finish: Callable[[Any], Any] | None = finish
        self._result: Any = None
        self._lock = threading.Lock()

    def wait(self, timeout: float | None = None) -> Any:
        """See pycomm.Work.wait."""
        if timeout is not None and not checks.number(timeout, "timeout") >= 0:
            raise ValueError(f"`timeout` is {timeout!r}: pass seconds, 0 or more")
        deadline = None if timeout is None else time.monotonic() + timeout
        found = None
        for work in self._works:
            found = work.wait() if deadline is None else work.wait(max(deadline - time.monotonic(), 1e-6))
        with self._lock:
            if self._finish is not None:
                self._result = self._finish(found)
                self._finish = None
        return self._result

    def result(self) -> Any:
        """Waits, and returns what the blocking call returns."""
        return self.wait()

    def is_completed(self) -> bool:
        """Whether the call has completed; if it has, without an error, the buffers hold the result."""
        if not all(work.is_completed() for work in self._works):
            return False
        if self.exception() is None:
            self.wait()
        return True

    def add_done_callback(self, fn: Callable[[Any], Any]) -> None:
        """See pycomm.Work.add_done_callback; the last part of the call that completes calls it."""
        left = len(self._works)

        def count(_: Any) -> None:
            nonlocal left
            with self._lock:
                left -= 1
                done = left == 0
            if done:
                fn(self)

        for work in self._works:
            work.add_done_callback(count)

    def exception(self) -> BaseException | None:
        """The call's error, or None while it has none."""
        return next((error for work in self._works if (error := work.exception()) is not None), None)

    def settle(self) -> None:
        """Waits, and leaves an error to those who ask for the result."""
        with contextlib.suppress(_native.CommError):
            self.wait()


def _resolve(codec: Any) -> Codec:
    if isinstance(codec, Codec):
        return codec
    if not isinstance(codec, str):
        raise TypeError(
            f"`codec` is {codec!r}: pass a name ({', '.join(DEFAULTS)}) or an object of pycomm.codecs"
        )
    if codec not in DEFAULTS:
        near = difflib.get_close_matches(codec.lower(), DEFAULTS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"`codec` is {codec!r}{hint}: there are {', '.join(DEFAULTS)}")
    return DEFAULTS[codec]


def _feedback_of(codec: Codec, comm: _native.Communicator) -> ErrorFeedback | None:
    given = getattr(codec, "error_feedback", None)
    if isinstance(given, ErrorFeedback):
        return given
    if not (codec.feedback_by_default if given is None else given):
        return None
    with _lock:
        return _kept.setdefault(comm, ErrorFeedback())


def _places(x: Any, tag: str | None, codec: Codec) -> Places:
    if not isinstance(x, Bucket):
        return ((_needed(tag, codec), 0, _count(x)),)
    names = x.names if x.named else [f"{_needed(tag, codec)}[{i}]" for i in range(len(x))]
    return tuple((name, s.begin, s.end) for name, s in zip(names, x.segments, strict=True))


def _needed(tag: str | None, codec: Codec) -> str:
    if tag is None:
        raise ValueError(
            f"{codec.name} with error feedback keeps what it lost under the parameter's name: pass tag=, or a"
            " Bucket with names, or error_feedback=False"
        )
    return tag


def _carried_dtype(x: Any, what: str) -> str:
    checks.buffer(x, what)
    dtype, _ = _native.describe_buffer(x, what)
    if dtype not in ("float32", "float16", "bfloat16"):
        raise TypeError(
            f"`{what}` is {dtype}: codecs carry float32, float16 and bfloat16; convert it, or leave codec out"
        )
    return dtype


def _data(x: Any) -> Any:
    return x.data if isinstance(x, Bucket) else x


def _count(x: Any) -> int:
    return math.prod(_native.describe_buffer(x, "x")[1])


def _is_finite(x: Any) -> bool:
    data = _data(x)
    _, _, nans, infs = _native.pack(data, [data], [0], [_count(data)])  # in place: reads it, and counts
    return bool(nans == 0 and infs == 0)


# Residuals of codecs that have no ErrorFeedback of their own: a parameter's, whatever codec carries it.
_kept: WeakKeyDictionary[_native.Communicator, ErrorFeedback] = WeakKeyDictionary()
_lock = threading.Lock()
