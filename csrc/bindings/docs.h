// What help() says of the collectives. The first line of each is its signature, which Python parses.
#pragma once

namespace pycomm::bindings::docs {

inline constexpr const char* kAllReduce =
    R"(all_reduce($self, x, *, op='sum', out=None, algorithm=None, deterministic=False, timeout=None, tag=None, async_op=False, stream=None, codec=None, step=None)
--

Combines `x` of all ranks element by element; every rank gets the result, with the same bits.

In place, or into `out` (same count and dtype, not overlapping `x` in part); returns where the result is. `x` is an array, a
tensor, or anything with DLPack or the buffer protocol, contiguous, of any shape; a list of them is one call for each
dtype, packed side by side. All ranks pass as many elements of the same dtype; shapes are not compared.

`op`: "sum", "prod", "min", "max", "avg", "band", "bor", "bxor" or pycomm.premul_sum(factor). float16, bfloat16 and
float8 are summed in float32 and rounded once. `deterministic`: sums associate as the balanced binary tree over ranks,
whatever the size. `algorithm`: a name from docs/algorithms.md, which has their papers; the library chooses otherwise.

`timeout`: how many seconds this call waits for a rank that is late, in the place of the group's; float("inf") for no
deadline. `tag`: a name that all ranks must agree on. `async_op`: returns a Work at once. `stream`: of GPU buffers.

`codec`: float32, float16 and bfloat16 sums and averages cross between ranks compressed: a name ("bf16", "int8", ...) or
an object of pycomm.codecs, the same on all ranks. `step`, of 32 bits, numbers the calls for stochastic rounding: the same
call with the same step gives the same bits; it defaults to `codec_step`, which counts. TypeError for other dtypes and
operators; ValueError where residuals are to be kept and nothing names them: a Bucket's names, or `tag`.

Raises TypeError for what is no buffer, a dtype that pycomm does not know or that does not take `op`, and ValueError for
buffers that are strided, read-only, of another size or overlap, and for an algorithm that cannot run this call: both
before any rank has moved. Raises CommError (PeerLostError, MismatchError, CommTimeoutError, AbortedError) when the
group has failed: the buffers are then undefined.)";

inline constexpr const char* kAllReduceInit =
    R"(all_reduce_init($self, x, *, op='sum', out=None, algorithm=None, deterministic=False, timeout=None, tag=None, stream=None, codec=None, step=None)
--

Binds an all_reduce once; calling what is returned runs it on the same buffers. Local: moves nothing by itself.

The call takes no arguments, blocks, and returns where the result is. `x` is one buffer, no list; it is kept alive, and
must stay the one that is meant: zero_grad() gives a parameter another gradient. With a codec every run is a step of its
own, unless `step` is given; one thread at a time may run it. Arguments and errors as all_reduce.)";

inline constexpr const char* kReduceScatter =
    R"(reduce_scatter($self, x, *, out=None, counts=None, op='sum', algorithm=None, deterministic=False, timeout=None, tag=None, async_op=False, stream=None, codec=None, step=None)
--

Combines `x` of all ranks and leaves each rank its part along axis 0: of shape (rows / ranks, ...), or `counts[rank]` rows.

ValueError where the rows do not divide and there is no `counts`, which is the same on all ranks. `out` may be this rank's own part of `x`. Returns `out`, made if not given. Other arguments and errors as all_reduce.)";

inline constexpr const char* kAllGather =
    R"(all_gather($self, x, *, out=None, counts=None, algorithm=None, timeout=None, tag=None, async_op=False, stream=None, codec=None, step=None)
--

Gives every rank the `x` of all ranks, concatenated on axis 0 in rank order.

`counts`: each rank's rows, where they differ. `x` may be this rank's own part of `out`; `out` may also be stacked,
(ranks, *x.shape). Returns `out`, made if not given. Other arguments and errors as all_reduce.)";

inline constexpr const char* kBroadcast =
    R"(broadcast($self, x, *, root=0, out=None, algorithm=None, timeout=None, tag=None, async_op=False, stream=None)
--

Gives every rank rank `root`'s `x`, in place or into `out`; `x` may be a list. Arguments and errors as all_reduce.

All ranks pass as many elements of the same dtype. The root's `x` is only read. Returns where the result is.
`comm.broadcast(list(model.state_dict().values()))` gives a torch model the same weights and buffers on all ranks.)";

inline constexpr const char* kReduce =
    R"(reduce($self, x, *, root=0, op='sum', out=None, algorithm=None, deterministic=False, timeout=None, tag=None, async_op=False, stream=None)
--

Combines `x` of all ranks at rank `root`, in place or into `out`; other ranks' buffers stay as they are.

Returns where the result is at the root. Other arguments and errors as all_reduce.)";

inline constexpr const char* kGather =
    R"(gather($self, x, *, root=0, out=None, counts=None, algorithm=None, timeout=None, tag=None, async_op=False, stream=None)
--

Gives rank `root` the `x` of all ranks, concatenated on axis 0; others get None. See all_gather.

`out`, of the root alone, is made if not given. Other arguments and errors as all_reduce.)";

inline constexpr const char* kScatter =
    R"(scatter($self, x=None, *, root=0, out=None, counts=None, algorithm=None, timeout=None, tag=None, async_op=False, stream=None)
--

Gives each rank its part, along axis 0, of rank `root`'s `x`. Other ranks pass `out` alone. See reduce_scatter.

`counts`: each rank's rows, where they differ. Returns `out`. Other arguments and errors as all_reduce.)";

inline constexpr const char* kAllToAll =
    R"(all_to_all($self, x, *, out=None, send_counts=None, recv_counts=None, algorithm=None, timeout=None, tag=None, async_op=False, stream=None)
--

Sends part r of `x`, along axis 0, to rank r; `out` holds what came from each rank, in rank order.

Parts are equal, or `send_counts[r]` rows go to rank r and `recv_counts[r]` rows come from it: on all ranks or on none.
`out` may be `x`. Returns `out`, made if not given. Other arguments and errors as all_reduce.)";

inline constexpr const char* kBarrier =
    R"(barrier($self, *, algorithm=None, timeout=None, tag=None, async_op=False, stream=None)
--

Returns when all ranks have called it. Moves no data. Arguments and errors as all_reduce.)";

inline constexpr const char* kSend =
    R"(send($self, x, dst, *, algorithm=None, timeout=None, tag=None, async_op=False, stream=None)
--

Sends `x` to rank `dst`, which calls recv with as many elements of the same dtype and the same tag, in the same order.

Returns when `x` may be used again: a message of a few hundred KiB may not have been received by then, a longer one
is received while it is sent. Messages from one rank to another arrive in the order in which they were sent, and wait for
no other call. Two ranks that exchange long messages call send_recv. A tag is compared and selects no message:
MismatchError where tags, counts or dtypes differ. ValueError where `dst` is this rank. Other arguments and errors as
all_reduce.)";

inline constexpr const char* kRecv =
    R"(recv($self, x, src, *, algorithm=None, timeout=None, tag=None, async_op=False, stream=None)
--

Receives into `x` what rank `src` sends, exactly as many elements; returns `x`. See send.)";

inline constexpr const char* kSendRecv =
    R"(send_recv($self, x, dst, out, src, *, timeout=None, tag=None, stream=None)
--

Sends `x` to rank `dst` while it receives into `out` what rank `src` sends; returns `out`.

As a send and a receive that do not wait for each other: ranks that all exchange, in pairs or along a ring, need no
order among them. The peers may as well call send, recv, or both; a rank that is both peers itself copies. `x` and `out` must not overlap. See send.)";

}  // namespace pycomm::bindings::docs
