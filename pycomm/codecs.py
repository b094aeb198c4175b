"""Gradient codecs: comm.all_reduce(x, codec="int8"), or codec=pycomm.codecs.Int8(rounding="nearest").

What each does to values, its error and its bytes are in docs/codecs.md; the wire format and the arithmetic
are in csrc/kernels/codec.h. Codecs carry sums and averages of float32, float16 and bfloat16 arrays and
tensors. All ranks must pass the same codec, and end with the same bits.
"""

from __future__ import annotations

import contextlib
import math
import operator
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

from pycomm import _native
from pycomm.bucket import Bucket
from pycomm.feedback import ErrorFeedback, Places, one_dimensional

__all__ = [
    "BF16",
    "FP8E4M3",
    "FP8E5M2",
    "FP16",
    "MXFP8",
    "BlockCodec",
    "Codec",
    "ErrorFeedback",
    "Int4",
    "Int8",
    "SharedInt",
    "Sign",
    "TopK",
    "call",
    "one_dimensional",
]

Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """What is common to all codecs. They are values: equal if their parameters are, and usable as keys.

    `error_feedback` is an ErrorFeedback, which keeps residuals; False for none; True for residuals that
    live as long as the communicator does. None is the codec's own choice: none, but for Sign and TopK.
    Residuals need the parameters' names: those of a Bucket, or `tag=` for an array or list.
    """

    name: ClassVar[str]
    feedback_by_default: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class BlockCodec(Codec):
    """A codec that makes blocks of elements into bytes, each by itself, so that plans can carry it."""

    def native(self) -> _native.Codec:
        """What the kernels know of it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class _Rounded(BlockCodec):
    rounding: Rounding | None = None
    seed: int = 0
    error_feedback: ErrorFeedback | bool | None = None

    def __post_init__(self) -> None:
        if self.rounding not in (None, "nearest", "stochastic"):
            raise ValueError(
                f"rounding={self.rounding!r}: 'nearest', 'stochastic', or None to go by error_feedback"
            )
        _check_seed(self.seed)
        _check_feedback(self.error_feedback)

    def native(self) -> _native.Codec:
        # With feedback what rounding loses is not lost; without, only random rounding has no bias.
        rounding = self.rounding or ("nearest" if self.error_feedback else "stochastic")
        return _native.Codec(self.name, rounding=rounding, seed=self.seed, **self._details())

    def _details(self) -> dict[str, bool]:
        return {}


@dataclass(frozen=True, kw_only=True)
class FP16(_Rounded):
    """IEEE half precision: 2 bytes an element. What is beyond 65504 becomes 65504; NaN and Inf pass.

    `rounding`: "nearest" (even), "stochastic" (up or down with the probability that makes it unbiased), or
    None: nearest with error feedback, stochastic without. Random bits are Philox's, of `seed`, the call's
    step, the rank and the element, so that they depend on nothing else.
    """

    name = "fp16"


@dataclass(frozen=True, kw_only=True)
class BF16(_Rounded):
    """bfloat16: 2 bytes an element, float32's range, 8 bits of precision. NaN and Inf pass."""

    name = "bf16"


@dataclass(frozen=True, kw_only=True)
class FP8E4M3(_Rounded):
    """float8_e4m3fn in blocks of 256 under a float32 scale, amax/448: 1.016 bytes an element.

    (Micikevicius et al., FP8 formats for deep learning, 2022.)
    """

    name = "fp8_e4m3"


@dataclass(frozen=True, kw_only=True)
class FP8E5M2(_Rounded):
    """float8_e5m2 in blocks of 256 under a float32 scale, amax/57344: 1.016 bytes an element."""

    name = "fp8_e5m2"


@dataclass(frozen=True, kw_only=True)
class MXFP8(_Rounded):
    """float8_e4m3fn in blocks of 32 under a power of two: 1.031 bytes an element.

    `scale`: "floor" is the OCP Microscaling Formats specification v1.0, under which a block's largest values
    may saturate; "ceil" takes the least power of two under which none does.
    """

    scale: Literal["floor", "ceil"] = "floor"
    name = "mxfp8"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in ("floor", "ceil"):
            raise ValueError(f"scale={self.scale!r}: 'floor' or 'ceil'")

    def _details(self) -> dict[str, bool]:
        return {"ceil_scale": self.scale == "ceil"}


@dataclass(frozen=True, kw_only=True)
class Int8(_Rounded):
    """Integers of 8 bits in blocks of 128 under a bfloat16 scale, amax/127: 1.016 bytes an element.

    (With stochastic rounding: Alistarh et al., QSGD, NeurIPS 2017, in blocks and by the largest magnitude.)
    """

    name = "int8"


@dataclass(frozen=True, kw_only=True)
class Int4(_Rounded):
    """Integers of 4 bits in blocks of 32 under a bfloat16 scale, amax/7: 0.5625 bytes an element.

    `hadamard` rotates each block first, which spreads outliers: it helps heavy-tailed gradients and does
    nothing for Gaussian ones. (Ashkboos et al., QuaRot, NeurIPS 2024; for gradients: Vargaftik et al., DRIVE,
    NeurIPS 2021.)
    """

    hadamard: bool = False
    name = "int4"

    def _details(self) -> dict[str, bool]:
        return {"hadamard": self.hadamard}


@dataclass(frozen=True, kw_only=True)
class SharedInt(Codec):
    """Integers of `width` bits (8, 16 or 32) under scales that all ranks share, summed exactly.

    The ranks first agree on each block's largest magnitude, 128 elements a block; integers are at most
    (2^(width-1) - 1) / ranks, rounded stochastically. An exact sum depends on no algorithm and no order.
    ValueError where that leaves less than 7 levels: 8 bits carry 18 ranks. No error feedback, and all_reduce
    alone.
    (Sapio et al., SwitchML, NSDI 2021; Li et al., THC, NSDI 2024.)
    """

    width: Literal[8, 16, 32] = 8
    seed: int = 0
    name = "shared_int"

    def __post_init__(self) -> None:
        if self.width not in (8, 16, 32):
            raise ValueError(f"width={self.width!r}: 8, 16 or 32 bits")
        _check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class Sign(BlockCodec):
    """The sign of an element, times the mean magnitude of its block of 128: 0.156 bytes an element.

    Error feedback is on by default: without it this does not converge. (Seide et al., 1-bit SGD, Interspeech
    2014; Bernstein et al., signSGD, ICML 2018; Karimireddy et al., ICML 2019.)
    """

    error_feedback: ErrorFeedback | bool | None = None
    name = "sign"
    feedback_by_default = True

    def __post_init__(self) -> None:
        _check_feedback(self.error_feedback)

    def native(self) -> _native.Codec:
        return _native.Codec(self.name)


@dataclass(frozen=True, kw_only=True)
class TopK(Codec):
    """The k elements of largest magnitude, exactly: 8 bytes each. all_reduce alone.

    `ratio` of the elements, at least one, or `k` of them. Ties go to the lowest index. Each rank sends its
    own, and they are summed in float32 in rank order. Error feedback is on by default: without it what is
    small never arrives. (Aji and Heafield, EMNLP 2017; Lin et al., Deep gradient compression, ICLR 2018.)
    """

    ratio: float = 0.01
    k: int | None = None
    error_feedback: ErrorFeedback | bool | None = None
    name = "topk"
    feedback_by_default = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio!r}: a share of the elements, above 0 and at most 1")
        if self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k!r}: at least one element")
        _check_feedback(self.error_feedback)

    def kept(self, count: int) -> int:
        """How many of `count` elements there is room for: at least one."""
        return max(1, min(count, round(self.ratio * count) if self.k is None else self.k))


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
    if op not in ("sum", "avg"):
        raise TypeError(
            f"`op` is {op!r}: codecs carry 'sum' and 'avg' of floats, leave out `codec` for others"
        )
    if step is not None and not 0 <= operator.index(step) < 1 << 32:
        raise ValueError(f"`step` is {step!r}: a number of 32 bits")
    if stream is not None:
        raise ValueError("`stream` is for GPU buffers: CPU buffers have none, leave it out")
    if collective != "all_reduce" and isinstance(chosen, _ALL_REDUCE_ALONE):
        others = [name for name, each in _DEFAULTS.items() if not isinstance(each, _ALL_REDUCE_ALONE)]
        raise ValueError(f"{collective} cannot carry {chosen.name}, all_reduce can: pass {', '.join(others)}")
    if isinstance(chosen, TopK) and (algorithm is not None or deterministic):
        given = f"algorithm={algorithm!r}" if algorithm is not None else "deterministic=True"
        raise ValueError(f"{given}: topk is an all_gather of records, summed in rank order; leave it out")
    request = _Request(
        comm,
        collective,
        chosen,
        {"step": step, "op": op, "timeout": timeout, "async_op": async_op},
        {"algorithm": algorithm, "deterministic": deterministic, "counts": counts},
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
        feedback = _feedback_of(self.codec, self.comm)
        segments = x.segments if isinstance(x, Bucket) else None
        if feedback is None:
            return self._start(x, out, segments)
        places = _places(x, self.tag, self.codec)
        exempt = None
        if isinstance(x, Bucket) and self.collective == "all_reduce":
            exempt = _Exempt.of(x, out, feedback)
        if exempt is not None:
            places = tuple(place for place in places if place[0] not in exempt.names)
            segments = [segment for segment in x.segments if segment not in exempt.segments]
            if not segments:
                return self._reduce_plainly(x, out)
        layout = feedback.begin(self.comm, places, _count(x))
        works: list[Any] = []
        result = None
        if exempt is not None:
            works.append(self._reduce_plainly(exempt.taken(), None))
            if isinstance(
                self.codec, TopK
            ):  # knows no segments: what is exempt must not be among the largest
                x, out, result = exempt.left_out(), None, out
        residuals = {
            "residual": layout.now,
            "next_residual": layout.next,
            "residual_scale": float(feedback.scale),
        }
        works.append(self._start(x, out, segments, **residuals))

        def finish(found: Any) -> Any:
            found = found if result is None else result
            if exempt is not None:
                exempt.put()
            layout.end(_is_finite(found))
            return found

        if not self.common["async_op"]:
            return finish(works[-1])
        work = CodecWork(works, finish)
        layout.start(work.settle)
        return work

    def run_list(self, xs: Sequence[Any], out: Any) -> Any:
        """One call for each dtype."""
        if self.collective != "all_reduce":
            raise TypeError(f"`x` is a list: {self.collective} takes one buffer")
        outs = xs if out is None else out
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
            bucket = Bucket([xs[i] for i in indices], names=names)
            bucket.pack()
            bucket.tensors = [outs[i] for i in indices]
            for i in indices:
                if _carried_dtype(outs[i], f"out[{i}]") != dtype:
                    raise TypeError(f"`out[{i}]` is not of x's dtype, {dtype}")
            buckets.append(bucket)
        works = [self.run(bucket, None) for bucket in buckets]

        def finish(_: Any) -> Any:
            for bucket in buckets:
                bucket.unpack()
            return outs

        return CodecWork(works, finish) if self.common["async_op"] else finish(None)

    def _reduce_plainly(self, x: Any, out: Any) -> Any:
        common = {name: value for name, value in self.common.items() if name != "step" and value is not None}
        if out is not None:
            common["out"] = out
        if self.tag is not None:
            common["tag"] = self.tag
        return self.comm.all_reduce(x, **common)

    def _start(self, x: Any, out: Any, segments: Sequence[Any] | None, **residuals: Any) -> Any:
        arguments = {"out": out, "tag": self.tag, **self.common, **residuals}
        if isinstance(self.codec, TopK):
            del arguments["step"]  # it has nothing random
            return _native.run_topk(self.comm, x, self.codec.kept(_count(x)), **arguments)
        arguments["segments"] = segments
        if isinstance(self.codec, SharedInt):  # exact sums are deterministic, whether asked for or not
            arguments |= {"seed": self.codec.seed, "algorithm": self.special["algorithm"]}
            return _native.run_shared_int(self.comm, x, self.codec.width, **arguments)
        assert isinstance(self.codec, BlockCodec)
        arguments |= self.special
        return _native.run_codec(self.comm, self.collective, x, self.codec.native(), **arguments)


class _Exempt:
    """The tensors of a bucket that error feedback exempts, copied to a bucket of their own and back."""

    def __init__(self, x: Bucket, out: Any, chosen: list[tuple[str, Any]]) -> None:
        self.names = frozenset(name for name, _ in chosen)
        self.segments = [segment for _, segment in chosen]
        self._x, self._out = x, out
        self._own = Bucket(self._parts(x), names=[name for name, _ in chosen])

    @classmethod
    def of(cls, x: Bucket, out: Any, feedback: ErrorFeedback) -> _Exempt | None:
        tensors = zip(x.names, x.segments, x.views, strict=True)
        chosen = [
            (name, segment) for name, segment, view in tensors if feedback.exempt(name, tuple(view.shape))
        ]
        return cls(x, out, chosen) if chosen else None

    def taken(self) -> Bucket:
        self._own.pack()
        return self._own

    def left_out(self) -> Any:
        """Where the result will be, holding x with zeros in their place."""
        result = self._x if self._out is None else self._out
        if self._out is not None:
            _native.pack(_data(result), [self._x.data], [0], [_count(self._x)], stats=False)
        for part in self._parts(result):
            part[:] = 0
        return result

    def put(self) -> None:
        self._own.tensors = self._parts(self._x if self._out is None else self._out)
        self._own.unpack()

    def _parts(self, of: Any) -> list[Any]:
        return [_data(of)[segment.begin : segment.end] for segment in self.segments]


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
        return self.wait()

    def is_completed(self) -> bool:
        if not all(work.is_completed() for work in self._works):
            return False
        if self.exception() is None:
            self.wait()
        return True

    def exception(self) -> BaseException | None:
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
            f"`codec` is {codec!r}: pass a name ({', '.join(_DEFAULTS)}) or an object of pycomm.codecs"
        )
    if codec not in _DEFAULTS:
        raise ValueError(f"`codec` is {codec!r}: there are {', '.join(_DEFAULTS)}")
    return _DEFAULTS[codec]


def _feedback_of(codec: Codec, comm: _native.Communicator) -> ErrorFeedback | None:
    given = getattr(codec, "error_feedback", None)
    if isinstance(given, ErrorFeedback):
        return given
    if not (codec.feedback_by_default if given is None else given):
        return None
    with _lock:
        return _kept.setdefault(comm, {}).setdefault(codec, ErrorFeedback())


def _places(x: Any, tag: str | None, codec: Codec) -> Places:
    if isinstance(x, Bucket):
        return tuple((name, s.begin, s.end) for name, s in zip(x.names, x.segments, strict=True))
    return ((_needed(tag, codec), 0, _count(x)),)


def _needed(tag: str | None, codec: Codec) -> str:
    if tag is None:
        raise ValueError(
            f"{codec.name} with error feedback keeps what it lost under the parameter's name: pass tag=, or a"
            " Bucket with names, or error_feedback=False"
        )
    return tag


def _carried_dtype(x: Any, what: str) -> str:
    dtype, _ = _native.describe_packable(x, what)
    if dtype not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"`{what}` is {dtype}: codecs carry float32, float16 and bfloat16")
    return dtype


def _data(x: Any) -> Any:
    return x.data if isinstance(x, Bucket) else x


def _count(x: Any) -> int:
    data = _data(x)
    return math.prod(data.shape if hasattr(data, "shape") else memoryview(data).shape or ())


def _is_finite(x: Any) -> bool:
    data = _data(x)
    _, _, nans, infs = _native.pack(data, [data], [0], [_count(data)])  # in place: reads it, and counts
    return bool(nans == 0 and infs == 0)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed!r}: a number of 64 bits")


def _check_feedback(feedback: Any) -> None:
    if feedback is not None and not isinstance(feedback, (bool, ErrorFeedback)):
        raise TypeError(
            f"error_feedback={feedback!r}: an ErrorFeedback, True, False, or None for the codec's default"
        )


_DEFAULTS: dict[str, Codec] = {
    kind.name: kind() for kind in (FP16, BF16, FP8E4M3, FP8E5M2, MXFP8, Int8, Int4, SharedInt, Sign, TopK)
}

# Residuals of codecs that have no ErrorFeedback of their own.
_kept: WeakKeyDictionary[_native.Communicator, dict[Codec, ErrorFeedback]] = WeakKeyDictionary()
_lock = threading.Lock()
