"""Gradient codecs: comm.all_reduce(x, codec="int8"), or codec=pycomm.codecs.Int8(rounding="nearest").

What each does to values, its error and its bytes are in docs/codecs.md; the wire format and the arithmetic
are in csrc/kernels/codec.h. Codecs carry sums and averages of float32, float16 and bfloat16 arrays and
tensors. All ranks must pass the same codec, and end with the same bits.
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
    SharedInt,
    Sign,
    TopK,
)

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
    "one_dimensional",
]
