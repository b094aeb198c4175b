"""Compression in DistributedDataParallel: a communication hook that averages its buckets."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import pycomm
from pycomm.codecs.feedback import ErrorFeedback, Rule
from pycomm.codecs.kinds import Codec
from pycomm.codecs.powersgd import PowerSGD
from pycomm.torch.collectives import communicator_of
from pycomm.torch.compression import Compression

_Names = tuple[str, ...]


@dataclass
class _Flight:
    """One of DDP's buckets on its way."""

    buffer: Any  # DDP's, of which gradients are views
    future: Any
    names: _Names  # of what is in `bucket`
    bucket: pycomm.Bucket | None = None  # where gradients are encoded
    others: list[Any] = field(default_factory=list)  # gradients
    works: list[Any] = field(default_factory=list)

    def land(self) -> bool:
        """Brings the averages to DDP. Returns whether they are finite."""
        for work in self.works:
            work.wait()
        finite = self.bucket is None or self.bucket.unpack().finite
        self.future.set_result(self.buffer)
        return finite and all(bool(x.isfinite().all()) for x in self.others)


class Replicas(Compression):
    """Buckets are sent while backward() goes on, and wait for their averages in the hook of the last one.

    DDP fills other buckets from its second step on, and so do other models: what is kept is kept by the names
    of parameters, and a pycomm.Bucket is made for whatever parameters come together.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        codec: Codec | PowerSGD | str,
        error_feedback: ErrorFeedback | bool | None,
        exempt: Iterable[str] | Rule,
    ) -> None:
        if model._comm_hooks:
            raise ValueError(
                "`model` has a communication hook already, maybe of an earlier compress(), and torch takes"
                " one: wrap the module in another DistributedDataParallel"
            )
        if model.mixed_precision is not None:
            raise ValueError(
                "mixed_precision of DistributedDataParallel has a hook of its own: use torch.autocast, or a"
                " model of bfloat16"
            )
        if model.skip_all_reduce_unused_params:
            raise ValueError(
                "skip_all_reduce_unused_params leaves out buckets, on which the hook relies: pass False"
            )
        names = {id(p): name for name, p in model.module.named_parameters()}
        # What DDP averages, in its order, and of which it expects sparse gradients.
        parameters, are_sparse = model._build_params_for_reducer()
        for p, is_sparse in zip(parameters, are_sparse, strict=True):
            if is_sparse:
                raise ValueError(
                    f"gradients of {names[id(p)]!r} are sparse, which DistributedDataParallel does not hand"
                    " to a communication hook: pass sparse=False to the embedding"
                )
        named = {names[id(p)]: p for p in parameters}
        self._names = {id(p): name for name, p in named.items()}
        comm = communicator_of(model.process_group)
        super().__init__(comm, named, codec, error_feedback, exempt, "all_reduce")
        if self._feedback is not None or isinstance(self._codec, PowerSGD):
            _require_contiguous({name: p for name, p in named.items() if name in self._compressed})
        self._hold()
        self._buckets: dict[_Names, pycomm.Bucket] = {}
        self._flights: list[_Flight] = []
        finds_unused = model.find_unused_parameters or model.static_graph
        self._finds_unused = finds_unused and self._feedback is not None
        self._model = weakref.ref(model)  # which keeps this alive: a cycle through C++ would never end
        self._owed: dict[str, Any] = {}  # of parameters that this rank's pass may not have used
        model.register_comm_hook(None, lambda state, bucket: self._average(bucket))

    def _average(self, of_ddp: Any) -> Any:
        if of_ddp.index() == 0:
            self._flights.clear()  # of a step that has failed
            self._owed.clear()
        names = [self._names[id(p)] for p in of_ddp.parameters()]
        flight = self._sent_off(names, of_ddp.gradients(), of_ddp.buffer())
        self._flights.append(flight)
        if of_ddp.is_last():
            self._land()
        return flight.future

    def _sent_off(self, names: list[str], gradients: list[Any], buffer: Any) -> _Flight:
        pairs = list(zip(names, gradients, strict=True))
        compressed = [(name, x) for name, x in pairs if name in self._compressed]
        exact = [x for name, x in pairs if name not in self._compressed]
        kept, tensors = tuple(name for name, _ in compressed), [x for _, x in compressed]
        flight = _Flight(buffer, torch.futures.Future(), kept, others=exact)
        self._count(tensors, exact)
        if self._finds_unused and self._feedback is not None:
            self._owed |= {name: self._feedback.owed(name) for name, x in compressed if not x.any()}
        if exact:
            tag = "compress: exempt parameters"
            flight.works.append(self._comm.all_reduce(exact, op="avg", tag=tag, async_op=True))
        if compressed and isinstance(self._codec, PowerSGD):
            flight.works.append(self._codec.begin(tensors, self._comm, kept))
            flight.others = gradients
        elif compressed:
            bucket = self._buckets.get(kept)
            if bucket is None:
                bucket = pycomm.Bucket(tensors, names=kept, comm=self._comm)
            bucket.tensors = tensors
            bucket.pack()
            step = self._next_step()
            work = self._comm.all_reduce(bucket, op="avg", codec=self._codec, step=step, async_op=True)
            flight.works.append(work)
            flight.bucket = bucket
        return flight

    def _land(self) -> None:
        flights, self._flights = self._flights, []
        finite = [flight.land() for flight in flights]
        if self._feedback is not None and not all(finite):
            self._feedback.skip()
        self._buckets = {flight.names: flight.bucket for flight in flights if flight.bucket is not None}
        if self._owed and torch._C._current_graph_task_id() != -1:  # not in DDP's join()
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: queue(self._owe_to_unused))  # after DDP's own callback, which comes in between

    def _owe_to_unused(self) -> None:
        """DDP drops the average of a parameter that no rank has used: what was paid there is still owed."""
        assert self._feedback is not None
        model = self._model()
        assert model is not None
        used = model.reducer._get_local_used_map().tolist()  # over all ranks, by now
        for name, is_used in zip(self._names.values(), used, strict=True):
            if name in self._owed and not is_used:
                self._feedback.owe(name, self._owed[name])


def _require_contiguous(parameters: dict[str, Any]) -> None:
    """DDP's gradients have the order in memory of their parameters, and so would what is kept of them."""
    for name, p in parameters.items():
        if not p.is_contiguous():
            raise ValueError(
                f"parameter {name!r} is not contiguous, as with channels_last, so that its residuals would be"
                " those of other elements in another model: call"
                " model.to(memory_format=torch.contiguous_format) before DistributedDataParallel, name the"
                " parameter in `exempt`, or pass a codec without error feedback"
            )
