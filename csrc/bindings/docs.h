// The docstrings of the collectives. The first line of each is its signature, which Python parses.
#pragma once

namespace pycomm::bindings::docs {

inline constexpr const char* kAllReduce =
    R"(all_reduce($self, x, *, op='sum', out=None, algorithm=None, deterministic=False, timeout=None, tag=None, async_op=False, stream=None, codec=None, step=None)
--

Combines `x` of all ranks element by element; every rank gets the result, with the same bits.

Works in place, or writes to `out`, which has the count and dtype of `x` and does not overlap it in part. Returns
the buffer that holds the result. `x` is an array, a tensor, or anything with DLPack or the buffer protocol,
contiguous, of any shape. A list of them takes one call for each dtype, packed side by side, and one for each large
buffer. All ranks pass the same count and dtype; shapes are compared only in a list or a Bucket.

`op`: "sum", "prod", "min", "max", "avg", "band", "bor", "bxor" or pycomm.premul_sum(factor). float16, bfloat16 and
float8 are summed in float32 and rounded once. `deterministic`: sums associate as the balanced binary tree over ranks,
whatever the size. `algorithm`: a name from docs/algorithms.md; without it the library chooses.

`timeout`: how many seconds this call waits for a late rank, in place of the group's timeout; float("inf") for no
deadline. `tag`: a name for the call, the same on all ranks. `async_op`: returns a Work at once. `stream`: for GPU
buffers, which collectives do not take yet.

`codec`: compresses what crosses between ranks, for sums and averages of float32, float16 and bfloat16: a name ("bf16",
"int8", ...) or an object of pycomm.codecs, the same on all ranks. `step`, a number of 32 bits, decides the random bits of
stochastic rounding: the same call with the same step gives the same bits. It defaults to `codec_step`, which counts
calls. Raises TypeError for other dtypes and operators, and ValueError if error feedback keeps residuals and neither a
Bucket's names nor `tag` name them.

Raises TypeError for an object that is no buffer, and for a dtype that pycomm does not know or that `op` does not take;
ValueError for buffers that are strided, read-only, of different sizes or overlapping, and for an algorithm that cannot
run this call: both before this rank has moved. Raises CommError (PeerLostError, MismatchError, CommTimeoutError,
AbortedError) when the group has failed: the buffers are then undefined.)";

inline constexpr const char* kAllReduceInit =
    R"(all_reduce_init($self, x, *, op='sum', out=None, algorithm=None, deterministic=False, timeout=None, tag=None, stream=None, codec=None, step=None)
--

Binds an all_reduce once and returns a PersistentOp: calling that runs it on the same buffers. Local: moves nothing.

The PersistentOp takes no arguments, blocks, and returns the buffer that holds the result. `x` is one buffer, no list.
The op keeps it alive and goes on with it: bind again when zero_grad() has given a parameter another gradient. With a
codec every run is a step of its own, unless `step` is given, and one thread at a time may run it. Arguments and errors
as all_reduce.)";

inline constexpr const char* kReduceScatter =
    R"(reduce_scatter($self, x, *, out=None, counts=None, op='sum', algorithm=None, deterministic=False, timeout=None, tag=None, async_op=False, stream=None, codec=None, step=None)
--

Combines `x` of all ranks and gives each rank its part along axis 0: rows / ranks of them, or `counts[rank]`.

`counts` is the same on all ranks; without it, rows that do not divide by the ranks are a ValueError. `out` may be this
rank's own part of `x`. Returns `out`, made if not given. Other arguments and errors as all_reduce.)";

inline constexpr const char* kAllGather =
    R"(all_gather($self, x, *, out=None, counts=None, algorithm=None, timeout=None, tag=None, async_op=False, stream=None, codec=None, step=None)
--

Gives every rank the `x` of all ranks, concatenated on axis 0 in rank order.

`counts`: the rows of each rank, if they differ. `x` may be this rank's own part of `out`; `out` may also be stacked,
(ranks, *x.shape). Returns `out`, made if not given. `codec`: as in all_reduce, or "lossless", for bfloat16, which changes
no bit (pycomm.codecs.Lossless). Other arguments and errors as all_reduce.)";

inline constexpr const char* kBroadcast =
    R"(broadcast($self, x, *, root=0, out=None, algorithm=None, timeout=None, tag=None, async_op=False, stream=None, codec=None)
--

Gives every rank rank `root`'s `x`, in place or into `out`; `x` may be a list. Arguments and errors as all_reduce.

All ranks pass the same count and dtype. The root's `x` is only read. Returns the buffer that holds the result.
`codec`: "lossless" alone, for bfloat16: moves two thirds of the bytes and changes no bit (pycomm.codecs.Lossless).
`comm.broadcast(list(model.state_dict().values()))` gives a torch model the same weights and buffers on all ranks.)";

inline constexpr const char* kReduce =
    R"(reduce($self, x, *, root=0, op='sum', out=None, algorithm=None, deterministic=False, timeout=None, tag=None, async_op=False, stream=None)
--

Combines `x` of all ranks at rank `root`, in place or into `out`; other ranks' buffers stay as they are.

Returns `out`, or `x` if there is none; only the root's holds the result. Other arguments and errors as all_reduce.)";

inline constexpr const char* kGather =
    R"(gather($self, x, *, root=0, out=None, counts=None, algorithm=None, timeout=None, tag=None, async_op=False, stream=None)
--

Gives rank `root` the `x` of all ranks, concatenated on axis 0; others get None. See all_gather.

Only the root has an `out`, which is made if not given. Other arguments and errors as all_reduce.)";

inline constexpr const char* kScatter =
    R"(scatter($self, x=None, *, root=0, out=None, counts=None, algorithm=None, timeout=None, tag=None, async_op=False, stream=None)
--

Gives each rank its part, along axis 0, of rank `root`'s `x`. Other ranks pass only `out`. See reduce_scatter.

`counts`: the rows of each rank, if they differ. Returns `out`. Other arguments and errors as all_reduce.)";

inline constexpr const char* kAllToAll =
    R"(all_to_all($self, x, *, out=None, send_counts=None, recv_counts=None, algorithm=None, timeout=None, tag=None, async_op=False, stream=None)
--

Sends part r of `x`, along axis 0, to rank r; `out` holds the parts from all ranks, in rank order.

Parts are equal, unless all ranks pass counts: then `send_counts[r]` rows go to rank r and `recv_counts[r]` come from it.
`out` may be `x`. Returns `out`, made if not given. Other arguments and errors as all_reduce.)";

inline constexpr const char* kBarrier =
    R"(barrier($self, *, algorithm=None, timeout=None, tag=None, async_op=False, stream=None)
--

Returns when all ranks have called it. Moves no data. Arguments and errors as all_reduce.)";

inline constexpr const char* kSend =
    R"(send($self, x, dst, *, algorithm=None, timeout=None, tag=None, async_op=False, stream=None)
--

Sends `x` to rank `dst`, which calls recv with the same count, dtype and tag.

Returns when `x` may be used again: a message of a few hundred KiB may not have been received by then, a longer one
is received while it is sent. Messages from one rank to another arrive in the order in which they were sent, and wait for
no other call. Two ranks that exchange long messages call send_recv. A tag selects no message, it is only compared:
different tags, counts or dtypes are a MismatchError. Raises ValueError if `dst` is this rank. Other arguments and errors
as all_reduce.)";

inline constexpr const char* kRecv =
    R"(recv($self, x, src, *, algorithm=None, timeout=None, tag=None, async_op=False, stream=None)
--

Receives into `x` the message that rank `src` sends, of the same count; returns `x`. See send.)";

inline constexpr const char* kSendRecv =
    R"(send_recv($self, x, dst, out, src, *, timeout=None, tag=None, stream=None)
--

Sends `x` to rank `dst` while it receives into `out` what rank `src` sends; returns `out`.

The send and the receive do not wait for each other: ranks that all exchange, in pairs or along a ring, need no
order among them. A peer may call send, recv or both instead. If both peers are this rank, it copies. `x` and `out` must
not overlap. See send.)";

}  // namespace pycomm::bindings::docs
