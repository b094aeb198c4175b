"""Gradient codecs: comm.all_reduce(x, codec="int8"), or codec=pycomm.codecs.Int8(rounding="nearest").

docs/codecs.md describes what each codec does to values, its error and its bytes; csrc/kernels/codec.h defines
the wire format and the arithmetic. Codecs work for sums and averages of float32, float16 and bfloat16 arrays
and tensors. All ranks must pass the same codec, and all end with the same bits.
Lossless is none of them: it changes no bit, for all_gather and broadcast of bfloat16
(csrc/kernels/lossless.h).
"""

from pycomm.codecs.feedback import ErrorFeedback, one_dimensional
from pycomm.codecs.kinds import (
    BF16,
    FP8E4M3,
    FP8E5M2,
    FP16,
    MXFP8,
    BlockCodec,
    Codec,
    Int4,
    Int8,
    Lossless,
    SharedInt,
    Sign,
    TopK,
)
from pycomm.codecs.powersgd import PowerSGD

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
    "Lossless",
    "PowerSGD",
    "SharedInt",
    "Sign",
    "TopK",
    "one_dimensional",
]
