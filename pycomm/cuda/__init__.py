"""The kernels on GPU buffers: reduce, pack and unpack, codecs, top-k. The same bits as on the CPU.

Arguments are CuPy arrays, torch tensors, or anything with `__cuda_array_interface__` or DLPack, contiguous
and all on one device. A call enqueues its work and returns. It goes to torch's or CuPy's current stream,
whichever the arrays are of; `stream=` names another one: its handle, or an object of torch or CuPy. Calls can
be captured in a CUDA graph. Results do not depend on `blocks=`, the most thread blocks that a call may use
(all that the device holds).

Importing this needs no GPU; the first call loads what was built for it, and says what is missing.
"""

from pycomm.cuda.arrays import is_available
from pycomm.cuda.codecs import (
    decode,
    encode,
    shared_amax,
    shared_decode,
    shared_encode,
    topk_decode_add,
    topk_encode,
    topk_workspace_bytes,
    transcode,
)
from pycomm.cuda.kernels import Packing, reduce

__all__ = [
    "Packing",
    "decode",
    "encode",
    "is_available",
    "reduce",
    "shared_amax",
    "shared_decode",
    "shared_encode",
    "topk_decode_add",
    "topk_encode",
    "topk_workspace_bytes",
    "transcode",
]
