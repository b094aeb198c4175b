"""The collectives of torch.distributed's process groups, over a Communicator.

Methods have the names, arguments and results that torch expects, under its older names as well as its newer
ones: which of them torch calls depends on its version. Whatever registers them (pycomm.torch.process_group)
adds nothing to them.

Tensors need not be contiguous: one that is not goes through a copy. A call with `asyncOp` false blocks in the
native call, and the handle that it returns has completed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import GroupMember, ProcessGroup, ReduceOp

import pycomm
from pycomm import Communicator
from pycomm.torch import sparse
from pycomm.torch.messages import Inbox, Outbox, as_bytes
from pycomm.torch.profiling import is_profiled, recorded
from pycomm.torch.uncompiled import uncompiled
from pycomm.torch.work import Finish, Handle, completed, seconds

_OPS = {
    "SUM": "sum",
    "AVG": "avg",
    "PRODUCT": "prod",
    "MIN": "min",
    "MAX": "max",
    "BAND": "band",
    "BOR": "bor",
    "BXOR": "bxor",
}
# To compare two of torch's operators takes longer than a small call; their hashes differ.
_OP_OF_HASH: dict[int, Any] = {hash(ReduceOp(getattr(ReduceOp, name))): op for name, op in _OPS.items()}
# What Gloo's sum of bytes is, read as truth values.
_OPS_OF_BOOL = {"sum": "bor", "prod": "band"}

# Moved as bytes: pycomm has no arithmetic for them, and copies need none.
_COPIED_AS_BYTES = {
    getattr(torch, name)
    for name in ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2")
    if hasattr(torch, name)
}


@uncompiled
class Collectives:
    """One rank's view of a process group. `timeout` is how long a call waits for a late rank."""

    def __init__(self, comm: Communicator, timeout: timedelta) -> None:
        self._comm = comm
        self.set_timeout(timeout)
        self._inbox = Inbox(comm)
        self._outboxes = [Outbox(comm, rank) for rank in range(comm.size)]

    def set_timeout(self, timeout: timedelta) -> None:
        self._seconds = seconds(timeout)

    # Reductions

    def allreduce(self, tensors: list[Any], *opts: Any, **more: Any) -> Handle | None:
        try:  # the short way of dist.all_reduce, of which each microsecond counts
            (options,), (x,) = opts, tensors
            if not options.asyncOp and not is_profiled():
                op = _OP_OF_HASH[hash(options.reduceOp)]
                timeout = self._seconds if options.timeout.days < 0 else self._limit(options)
                self._comm.all_reduce(x, op=op, timeout=timeout)
                return None
        except (TypeError, ValueError, KeyError, AttributeError):
            pass  # refused before it began: the general way takes more kinds of tensors and options
        return self._allreduce(tensors, *opts, **more)

    @recorded("all_reduce")
    def _allreduce(self, tensors: list[Any], opts: Any = None) -> Handle:
        x = _one(tensors, "tensors")
        if x.layout is torch.sparse_coo:
            sparse.all_reduce(self._comm, x, _op(opts, x), self._limit(opts))
            return completed(tensors)
        target = _Target(x)
        return self._run(
            opts,
            tensors,
            [(self._comm.all_reduce, (target.buffer,), {"op": _op(opts, target.buffer)})],
            target,
        )

    @recorded("all_reduce")
    def allreduce_coalesced(self, tensors: list[Any], opts: Any = None) -> Handle:
        targets = [_Target(tensor) for tensor in tensors]
        calls: list[_Call] = []
        if targets:
            buffers = [target.buffer for target in targets]
            calls.append((self._comm.all_reduce, (buffers,), {"op": _op(opts, buffers[0])}))
        return self._run(opts, tensors, calls, *targets)

    @recorded("reduce")
    def reduce(self, tensors: list[Any], opts: Any) -> Handle:
        x = _one(tensors, "tensors")
        if self._comm.rank != opts.rootRank:
            x = _source(x)
            call: _Call = (self._comm.reduce, (x,), {"root": opts.rootRank, "op": _op(opts, x)})
            return self._run(opts, tensors, [call])
        target = _Target(x)
        call = (self._comm.reduce, (target.buffer,), {"root": opts.rootRank, "op": _op(opts, target.buffer)})
        return self._run(opts, tensors, [call], target)

    @recorded("reduce_scatter", 1)
    def reduce_scatter(self, outputs: list[Any], inputs: list[list[Any]], opts: Any = None) -> Handle:
        out, parts = _one(outputs, "output tensors"), _one(inputs, "input lists")
        _check_length(parts, self._comm.size, "input_list")
        target = _Target(out)
        if parts[self._comm.rank].numel() != out.numel():
            raise ValueError(
                f"`output` has {out.numel()} elements, and input_list[{self._comm.rank}]"
                f" has {parts[self._comm.rank].numel()}: pass tensors of the same size"
            )
        counts = [part.numel() for part in parts]
        more: dict[str, Any] = {"out": target.flat(), "op": _op(opts, target.buffer)}
        if len(set(counts)) > 1:
            more["counts"] = counts
        return self._run(opts, outputs, [(self._comm.reduce_scatter, (_joined(parts),), more)], target)

    def reduce_scatter_single(self, output: Any, input: Any, opts: Any = None) -> Handle:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    @recorded("reduce_scatter_tensor", 1)
    def reduce_scatter_single_coalesced(
        self, outputs: list[Any], inputs: list[Any], opts: Any = None
    ) -> Handle:
        targets, calls = [], []
        for out, x in zip(outputs, inputs, strict=True):
            _check_times(x, "input", self._comm.size, out, "output")
            target = _Target(out)
            more = {"out": target.flat(), "op": _op(opts, target.buffer)}
            calls.append((self._comm.reduce_scatter, (_source(x).reshape(-1),), more))
            targets.append(target)
        return self._run(opts, outputs, calls, *targets)

    # Copies

    @recorded("broadcast")
    def broadcast(self, tensors: list[Any], opts: Any) -> Handle:
        x = _one(tensors, "tensors")
        if self._comm.rank == opts.rootRank:
            return self._run(
                opts, tensors, [(self._comm.broadcast, (_movable(_source(x)),), {"root": opts.rootRank})]
            )
        target = _Target(x)
        return self._run(
            opts,
            tensors,
            [(self._comm.broadcast, (_movable(target.buffer),), {"root": opts.rootRank})],
            target,
        )

    @recorded("all_gather", 1)
    def allgather(self, outputs: list[list[Any]], inputs: list[Any], opts: Any = None) -> Handle:
        outs, x = _one(outputs, "output lists"), _one(inputs, "input tensors")
        _check_length(outs, self._comm.size, "tensor_list")
        _check_alike(outs, "tensor_list", x, "tensor")
        parts = _Parts(outs)
        call = (self._comm.all_gather, (_movable(_source(x)).reshape(-1),), {"out": _movable(parts.buffer)})
        return self._run(opts, outs, [call], parts)

    @recorded("all_gather", 1)
    def allgather_coalesced(self, outputs: list[list[Any]], inputs: list[Any], opts: Any = None) -> Handle:
        _check_length(outputs, self._comm.size, "output_tensor_lists")
        for i, outs in enumerate(outputs):
            _check_length(outs, len(inputs), f"output_tensor_lists[{i}]")
            for j, x in enumerate(inputs):
                _check_alike([outs[j]], f"output_tensor_lists[{i}]", x, f"input_tensor_list[{j}]")
        everything = [out for outs in outputs for out in outs]
        if not inputs:
            return self._run(opts, everything, [])
        parts = _Parts(everything)
        call = (self._comm.all_gather, (_movable(_joined(inputs)),), {"out": _movable(parts.buffer)})
        return self._run(opts, everything, [call], parts)

    def all_gather_single(self, output: Any, input: Any, opts: Any = None) -> Handle:
        return self.all_gather_single_coalesced([output], [input], opts)

    @recorded("all_gather", 1)
    def all_gather_single_coalesced(self, outputs: list[Any], inputs: list[Any], opts: Any = None) -> Handle:
        targets, calls = [], []
        for out, x in zip(outputs, inputs, strict=True):
            _check_times(out, "output", self._comm.size, x, "input")
            target = _Target(out)
            source = _movable(_source(x)).reshape(-1)
            calls.append((self._comm.all_gather, (source,), {"out": _movable(target.flat())}))
            targets.append(target)
        return self._run(opts, outputs, calls, *targets)

    @recorded("gather", 1)
    def gather(self, outputs: list[list[Any]], inputs: list[Any], opts: Any) -> Handle:
        x = _one(inputs, "input tensors")
        source = _movable(_source(x)).reshape(-1)
        if self._comm.rank != opts.rootRank:
            return self._run(opts, [], [(self._comm.gather, (source,), {"root": opts.rootRank})])
        outs = _one(outputs, "output lists")
        _check_length(outs, self._comm.size, "gather_list")
        _check_alike(outs, "gather_list", x, "tensor")
        parts = _Parts(outs)
        more = {"root": opts.rootRank, "out": _movable(parts.buffer)}
        return self._run(opts, outs, [(self._comm.gather, (source,), more)], parts)

    @recorded("scatter", 1)
    def scatter(self, outputs: list[Any], inputs: list[list[Any]], opts: Any) -> Handle:
        out = _one(outputs, "output tensors")
        target = _Target(out)
        more = {"root": opts.rootRank, "out": _movable(target.flat())}
        source: tuple[Any, ...] = ()
        if self._comm.rank == opts.rootRank:
            parts = _one(inputs, "input lists")
            _check_length(parts, self._comm.size, "scatter_list")
            _check_alike(parts, "scatter_list", out, "tensor")
            source = (_movable(_joined(parts)),)
        return self._run(opts, outputs, [(self._comm.scatter, source, more)], target)

    @recorded("all_to_all", 1)
    def alltoall(self, outputs: list[Any], inputs: list[Any], opts: Any = None) -> Handle:
        _check_length(outputs, self._comm.size, "output_tensor_list")
        _check_length(inputs, self._comm.size, "input_tensor_list")
        parts = _Parts(outputs)
        source = _movable(_joined(inputs))
        width = source.numel() // max(sum(x.numel() for x in inputs), 1) or 1  # bytes where these are sent
        more = {
            "out": _movable(parts.buffer),
            "send_counts": [x.numel() * width for x in inputs],
            "recv_counts": [x.numel() * width for x in outputs],
        }
        return self._run(opts, outputs, [(self._comm.all_to_all, (source,), more)], parts)

    @recorded("all_to_all", 1)
    def all_to_all_single(
        self, output: Any, input: Any, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> Handle:
        target = _Target(output)
        source = _movable(_source(input)).reshape(-1)
        out = _movable(target.flat())
        more = {"out": out}
        if output_splits or input_splits:
            more["send_counts"] = self._elements(input_splits, input, source, "input")
            more["recv_counts"] = self._elements(output_splits, output, out, "output")
        else:
            for tensor, name in ((input, "input"), (output, "output")):
                self._elements([], tensor, tensor, name)
        return self._run(opts, [output], [(self._comm.all_to_all, (source,), more)], target)

    @recorded("barrier")
    def barrier(self, opts: Any = None) -> Handle:
        return self._run(opts, [], [(self._comm.barrier, (), {})])

    # Messages

    @recorded("send")
    def send(self, tensors: list[Any], target: int, tag: int = 0) -> Handle:
        x = _source(_one(tensors, "tensors"))
        if target == self._comm.rank:
            self._inbox.put(x, tag)
            return completed(tensors)
        handle = Handle(tensors)
        handle.follow(self._outboxes[self._rank(target, "dst")].send(x, tag))
        return handle

    @recorded("recv")
    def recv(self, tensors: list[Any], source: int, tag: int = 0) -> Handle:
        x = _writable(_one(tensors, "tensors"))
        return self._inbox.receive(x, self._rank(source, "src"), tag)

    @recorded("recvAnySource")
    def recv_anysource(self, tensors: list[Any], tag: int = 0) -> Handle:
        return self._inbox.receive_any(_writable(_one(tensors, "tensors")), tag, self._seconds)

    # The older names

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def close(self) -> None:
        """Leaves the group. After a failure as well: a call has raised that one."""
        with suppress(pycomm.AbortedError):
            self._comm.close()

    def _run(self, opts: Any, result: list[Any], calls: list[_Call], *targets: _Target | _Parts) -> Handle:
        """Makes the calls, and then brings what they wrote to where the caller wants it."""
        finishes = [target.finish for target in targets if target.finish is not None]
        timeout = self._limit(opts)

        def finish() -> None:
            for each in finishes:
                each()

        if not getattr(opts, "asyncOp", True):
            for method, args, more in calls:
                method(*args, timeout=timeout, **more)
            finish()
            return completed(result)
        handle = Handle(result)
        works = [method(*args, timeout=timeout, async_op=True, **more) for method, args, more in calls]
        handle.follow(works, finish if finishes else None)
        return handle

    def _limit(self, opts: Any) -> float | None:
        """How many seconds the call may take."""
        own = None if opts is None else opts.timeout
        return self._seconds if own is None or own.days < 0 else seconds(own) or self._seconds

    def _elements(self, splits: list[int], x: Any, flat: Any, name: str) -> list[int]:
        """How many elements of `flat` each rank's rows of `x` are."""
        rows, size = x.shape[0] if x.dim() else 1, self._comm.size
        if not splits:
            if rows % size:
                raise ValueError(
                    f"`{name}` has {rows} rows, which do not divide by {size} ranks: pass {name}_split_sizes"
                )
            splits = [rows // size] * size
        if len(splits) != size or sum(splits) != rows or min(splits) < 0:
            raise ValueError(
                f"{name}_split_sizes is {list(splits)}: pass {size} numbers, one for each rank, whose sum is"
                f" {rows}, the rows of `{name}`"
            )
        return [split * (flat.numel() // max(rows, 1)) for split in splits]

    def _rank(self, rank: int, name: str) -> int:
        if not 0 <= rank < self._comm.size:
            raise ValueError(f"`{name}` is {rank}: the group's ranks go from 0 to {self._comm.size - 1}")
        return rank


def communicator_of(group: Any) -> Communicator:
    """Raises TypeError for a process group that is not pycomm's."""
    if group is None:
        raise TypeError('there is no process group yet: call init_process_group("pycomm") before')
    if group is GroupMember.NON_GROUP_MEMBER:
        raise TypeError("this rank is not in that process group")
    found = group
    if isinstance(group, ProcessGroup) and not isinstance(group, Collectives):
        with suppress(RuntimeError):  # it has a backend for each device, but none for this one
            found = group._get_backend(torch.device("cpu"))
    if not isinstance(found, Collectives):
        name = group.name() if isinstance(group, ProcessGroup) else repr(group)
        raise TypeError(
            f'the process group is {name}: pass one that pycomm made, as after init_process_group("pycomm")'
        )
    return found._comm


_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class _Target:
    """A tensor that a call writes. `buffer` is it, or a contiguous copy that `finish` writes back."""

    def __init__(self, tensor: Any) -> None:
        tensor = _writable(tensor)
        self.finish: Finish | None = None
        self.buffer = tensor
        if not tensor.is_contiguous():
            self.buffer = tensor.contiguous()
            self.finish = lambda: tensor.copy_(self.buffer)

    def flat(self) -> Any:
        return self.buffer.view(-1)


class _Parts:
    """Tensors that a call writes, one after the other: through a buffer, from which `finish` copies."""

    def __init__(self, tensors: list[Any]) -> None:
        tensors = [_writable(tensor) for tensor in tensors]
        counts = [tensor.numel() for tensor in tensors]
        self.buffer = torch.empty(sum(counts), dtype=tensors[0].dtype)

        def finish() -> None:
            for tensor, part in zip(tensors, self.buffer.split(counts), strict=True):
                tensor.copy_(part.view(tensor.shape))

        self.finish: Finish | None = finish


def _op(opts: Any, x: Any) -> Any:
    """pycomm's operator for torch's."""
    given = ReduceOp.SUM if opts is None else opts.reduceOp
    op = _OP_OF_HASH.get(hash(given))
    if op is None:
        if given == ReduceOp.PREMUL_SUM:
            return pycomm.premul_sum(float(given.factor))
        raise ValueError(f"pycomm has no {given}: pass one of {', '.join(_OPS)}, PREMUL_SUM")
    return _OPS_OF_BOOL.get(op, op) if x.dtype is torch.bool else op


def _source(x: Any) -> Any:
    """What a call reads: contiguous."""
    _check_tensor(x)
    return x.contiguous()


def _writable(x: Any) -> Any:
    """What a call writes: without its history, for which pycomm alone would refuse it."""
    _check_tensor(x)
    if any(stride == 0 and count > 1 for stride, count in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(
            f"a tensor of shape {tuple(x.shape)} and strides {x.stride()} has elements at the same place"
            " and cannot be written: pass x.contiguous()"
        )
    return x.detach() if x.requires_grad else x


def _check_tensor(x: Any) -> None:
    if x.layout is not torch.strided:
        raise ValueError(f"a tensor with layout {x.layout} cannot be sent: pass x.to_dense()")
    if x.device.type != "cpu":
        raise ValueError(
            f'a tensor on {x.device} cannot be sent yet: pycomm takes those of the CPU; use "nccl" for a GPU'
        )


def _movable(x: Any) -> Any:
    """For copies: any dtype."""
    return as_bytes(x) if x.dtype in _COPIED_AS_BYTES else x


def _joined(tensors: Iterable[Any]) -> Any:
    return torch.cat([_source(tensor).reshape(-1) for tensor in tensors])


def _one(items: Any, name: str) -> Any:
    if isinstance(items, torch.Tensor):
        return items
    if len(items) != 1:
        raise ValueError(f"{len(items)} {name}: pass one, pycomm has one device for each rank")
    return items[0]


def _check_length(items: list[Any], length: int, name: str) -> None:
    if len(items) != length:
        raise ValueError(f"`{name}` has {len(items)} items: pass {length}")


def _check_alike(tensors: list[Any], name: str, like: Any, like_name: str) -> None:
    for i, tensor in enumerate(tensors):
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise ValueError(
                f"{name}[{i}] is {_shown(tensor)}, and `{like_name}` is {_shown(like)}: unequal tensors are"
                " not gathered or scattered; pad them, or use all_to_all"
            )


def _check_times(large: Any, large_name: str, size: int, small: Any, small_name: str) -> None:
    if large.numel() != size * small.numel() or large.dtype != small.dtype:
        raise ValueError(
            f"`{large_name}` is {_shown(large)}, and `{small_name}` is {_shown(small)}: for {size} ranks,"
            f" `{large_name}` has {size} times as many elements, of the same dtype"
        )


def _shown(x: Any) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"
