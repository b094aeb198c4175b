"""The codecs as objects: values that say what crosses between ranks, see docs/codecs.md."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NoReturn

from pycomm import _native, checks
from pycomm.codecs.feedback import ErrorFeedback, kept

Rounding = Literal["nearest", "stochastic"]
Links = Literal["all", "wire"]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """What is common to all codecs. They are values: equal if their parameters are, and usable as keys.

    `error_feedback` is an ErrorFeedback, which keeps residuals; False for none; True for residuals that
    live as long as the communicator does. None is the codec's own choice: none, but for Sign and TopK.
    Residuals need the parameters' names: those of a Bucket, or `tag=` for an array or list.
    """

    name: ClassVar[str]
    feedback_by_default: ClassVar[bool] = False
    # The methods of the communicator that take it.
    carried_by: ClassVar[tuple[str, ...]] = ("all_reduce", "all_reduce_init", "reduce_scatter", "all_gather")

    @property
    def __pycomm_plain__(self) -> bool:
        """Whether it is a mere value: a call with it can be remembered, and keeps nothing alive."""
        return not isinstance(getattr(self, "error_feedback", None), ErrorFeedback)


@dataclass(frozen=True, kw_only=True)
class BlockCodec(Codec):
    """A codec that makes blocks of elements into bytes, each by itself, so that plans can carry it.

    `links` says where it does: on "all" links between ranks, or on the "wire" alone, between nodes: ranks of
    one node then exchange exact values. The name with "@wire" stands for that: codec="int8@wire". Error
    feedback takes "all".
    """

    links: Links = "all"

    def __post_init__(self) -> None:
        if self.links not in ("all", "wire"):
            raise ValueError(f"links={self.links!r}: 'all', or 'wire' for what crosses between nodes")
        if self.links == "wire" and _feeds_back(self):
            raise ValueError(
                f"codec {self.name}@wire and error feedback: between nodes a rank encodes sums of its node,"
                " and only a part of them, so that a part of what it loses would never be sent; pass"
                f' pycomm.codecs.{type(self).__name__}(links="wire", error_feedback=False), or links="all"'
            )

    def native(self) -> _native.Codec:
        """What the kernels know of it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class _Rounded(BlockCodec):
    rounding: Rounding | None = None
    seed: int = 0
    error_feedback: ErrorFeedback | bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounding not in (None, "nearest", "stochastic"):
            raise ValueError(
                f"rounding={self.rounding!r}: 'nearest', 'stochastic', or None to go by error_feedback"
            )
        _check_seed(self.seed)
        _check_feedback(self.error_feedback)

    def native(self) -> _native.Codec:
        # With feedback what rounding loses is not lost; without, only random rounding has no bias.
        rounding = self.rounding or ("nearest" if self.error_feedback else "stochastic")
        return _native.Codec(
            self.name, rounding=rounding, seed=self.seed, links=self.links, **self._details()
        )

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.hadamard, bool):
            raise TypeError(f"hadamard={self.hadamard!r}: True or False")

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
    carried_by = ("all_reduce", "all_reduce_init")

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
        super().__post_init__()
        _check_feedback(self.error_feedback)

    def native(self) -> _native.Codec:
        return _native.Codec(self.name, links=self.links)


@dataclass(frozen=True, kw_only=True)
class TopK(Codec):
    """The k elements of largest magnitude, exactly: 8 bytes each. all_reduce alone.

    `ratio` of the elements, at least one, or `k` of them, which counts if both are given. Ties go to the
    lowest index. Each rank sends its own, and they are summed in float32 in rank order. Error feedback is on
    by default: without it what is small never arrives. (Aji and Heafield, EMNLP 2017; Lin et al., Deep
    gradient compression, ICLR 2018.)
    """

    ratio: float = 0.01
    k: int | None = None
    error_feedback: ErrorFeedback | bool | None = None
    name = "topk"
    feedback_by_default = True
    carried_by = ("all_reduce", "all_reduce_init")

    def __post_init__(self) -> None:
        if not 0 < checks.number(self.ratio, "ratio") <= 1:
            raise ValueError(f"ratio={self.ratio!r}: a share of the elements, above 0 and at most 1")
        if self.k is not None and checks.integer(self.k, "k") < 1:
            raise ValueError(f"k={self.k!r}: at least one element")
        _check_feedback(self.error_feedback)

    def kept(self, count: int) -> int:
        """How many of `count` elements there is room for: at least one."""
        return max(1, min(count, round(self.ratio * count) if self.k is None else self.k))


@dataclass(frozen=True, kw_only=True)
class Lossless(Codec):
    """bfloat16 with every bit as it was, in about 0.67 of the bytes: all_gather and broadcast alone.

    Exponents are coded, signs and mantissas sent as they are: Gaussian data, such as weights and gradients,
    take 1.33 bytes an element. Data that cannot be made smaller take 4 bytes more for each 65536 elements.
    Of that bound all ranks send the share that the rank with the least gain needs, rounded up to a 128th.
    Calls raise TypeError for another dtype, ValueError from another collective. docs/codecs.md says when it
    pays. (Hershcovitch et al., ZipNN, 2024; Zhang et al., DFloat11, 2025.)
    """

    name = "lossless"
    carried_by = ("all_gather", "broadcast")


def _check_seed(seed: int) -> None:
    if not 0 <= checks.integer(seed, "seed") < 1 << 64:
        raise ValueError(f"seed={seed!r}: a number of 64 bits")


def _check_feedback(feedback: Any) -> None:
    if feedback is not None and not isinstance(feedback, (bool, ErrorFeedback)):
        raise TypeError(
            f"error_feedback={feedback!r}: an ErrorFeedback, True, False, or None for the codec's default"
        )


def _feeds_back(codec: Codec) -> bool:
    given = getattr(codec, "error_feedback", None)
    return codec.feedback_by_default if given is None else given is not False


# A name stands for the codec's defaults. Gradient codecs, which all_reduce carries, and all there are.
DEFAULTS: dict[str, Codec] = {
    kind.name: kind() for kind in (FP16, BF16, FP8E4M3, FP8E5M2, MXFP8, Int8, Int4, SharedInt, Sign, TopK)
}
NAMED: dict[str, Codec] = {**DEFAULTS, Lossless.name: Lossless()}


# ---- for the calls, which are native ----


def resolve(codec: Any, collective: str) -> Codec:
    """What `codec=` of a call of this name asks for. Raises TypeError, ValueError."""
    if codec == "powersgd" or getattr(codec, "name", None) == "powersgd":
        remedy = (
            "call pycomm.codecs.PowerSGD().all_reduce(gradients, comm), or give it to a GradientReducer"
            if collective.startswith("all_reduce")
            else _others(collective)
        )
        raise ValueError(f"{collective} cannot carry powersgd, which makes several calls a step: {remedy}")
    found = codec if isinstance(codec, Codec) else _named(codec)
    if collective not in found.carried_by:
        *most, last = (name for name in found.carried_by if name != "all_reduce_init")
        can = f"{', '.join(most)} and {last}" if most else last
        raise ValueError(f"{collective} cannot carry {found.name}, {can} can: {_others(collective)}")
    return found


def _others(collective: str) -> str:
    others = ", ".join(name for name, each in NAMED.items() if collective in each.carried_by)
    return f"pass {others}" if others else "leave codec out"


def _named(codec: Any) -> Codec:
    if not isinstance(codec, str):
        raise TypeError(
            f"`codec` is {codec!r}: pass a name ({', '.join(NAMED)}) or an object of pycomm.codecs"
        )
    name, at, links = codec.partition("@")
    by_wire = [
        each for each, kind in DEFAULTS.items() if isinstance(kind, BlockCodec) and not _feeds_back(kind)
    ]
    if name not in NAMED:
        known = by_wire if at else [*NAMED, *(f"{each}@wire" for each in by_wire)]
        near = difflib.get_close_matches(name.lower(), known, 1)
        hint = f" (did you mean {near[0] + (at and '@wire')!r}?)" if near else ""
        raise ValueError(f"`codec` is {codec!r}{hint}: there are {', '.join(NAMED)}")
    found = NAMED[name]
    if not at:
        return found
    if not isinstance(found, BlockCodec):
        raise ValueError(f"`codec` is {codec!r}: {name} cannot be used with @wire; {', '.join(by_wire)} can")
    found = replace(found, links="wire")
    if links != "wire":
        raise ValueError(
            f"`codec` is {codec!r}: {name}@wire encodes what crosses between nodes alone, {name} what crosses"
            " between any two ranks"
        )
    return found


def feedback_of(codec: Codec, comm: _native.Communicator) -> ErrorFeedback | None:
    """What keeps the residuals of a call: the codec's own, or the communicator's; None if nothing does."""
    given = getattr(codec, "error_feedback", None)
    if isinstance(given, ErrorFeedback):
        return given
    return kept(comm) if _feeds_back(codec) else None


def with_residuals(
    codec: Codec, error_feedback: ErrorFeedback | bool | None, comm: _native.Communicator
) -> Codec:
    """The codec of somebody who makes many calls: with this error feedback, unless it is None, and with
    residuals that are apart from those of the communicator's other calls."""
    used = codec
    if error_feedback is not None:
        if not hasattr(codec, "error_feedback"):
            raise ValueError(f"error_feedback={error_feedback!r}: {codec.name} has none")
        used = replace(codec, error_feedback=error_feedback)  # type: ignore[call-arg]
    if feedback_of(used, comm) is kept(comm):  # in which parameters of others may have the same names
        used = replace(used, error_feedback=ErrorFeedback())  # type: ignore[call-arg]
    return used


def wire_bytes(codec: Codec, count: int) -> int:
    """How many bytes one encode of `count` elements puts on the wire."""
    if isinstance(codec, TopK):
        return 16 + 8 * codec.kept(count)
    if isinstance(codec, SharedInt):
        return codec.width // 8 * count + 4 * -(-count // 128)  # and the exchange of magnitudes
    assert isinstance(codec, BlockCodec)
    return codec.native().wire_bytes(count)


def require_names(codec: Codec) -> NoReturn:
    """For a call with error feedback whose parameters have no names."""
    raise ValueError(
        f"{codec.name} with error feedback keeps what it lost under the parameter's name: pass tag=, or a"
        " Bucket with names, or error_feedback=False"
    )
