"""Compression in fully_shard (FSDP2): a reduce_scatter with a codec."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed import ReduceOp
from torch.distributed.fsdp import FSDPModule

from pycomm.codecs.feedback import ErrorFeedback, Rule
from pycomm.codecs.kinds import Codec
from pycomm.codecs.powersgd import PowerSGD
from pycomm.torch.collectives import communicator_of
from pycomm.torch.compression import Compression
from pycomm.torch.work import completed


@dataclass(frozen=True)
class _Parameter:
    """A parameter in the input of a reduce_scatter, where each rank has as many of its elements as another:
    rows of the dimension that is sharded, and padding."""

    name: str
    shape: tuple[int, ...]
    dim: int  # that is sharded
    ranks: int

    @property
    def width(self) -> int:
        """Elements for each rank."""
        if self.dim:
            return math.prod(self.shape) // self.ranks
        return -(-self.shape[0] // self.ranks) * math.prod(self.shape[1:])

    def table(self, whole: Any) -> Any:
        """(ranks, width) of the parameter's elements."""
        x = whole.reshape(self.shape)
        if self.dim:
            return torch.cat(x.chunk(self.ranks, self.dim)).reshape(self.ranks, self.width)
        padded = x.new_zeros(self.ranks * self.width)
        padded[: x.numel()] = x.reshape(-1)
        return padded.reshape(self.ranks, self.width)

    def whole(self, table: Any) -> Any:
        """The elements of the parameter, 1-D: table()'s inverse."""
        if self.dim:
            part = list(self.shape)
            part[self.dim] //= self.ranks
            return torch.cat([row.reshape(part) for row in table], self.dim).reshape(-1)
        return table.reshape(-1)[: math.prod(self.shape)]


class _Unit:
    """What one module reduces in a call. `compressed` says which of its parameters the codec carries; their
    residuals are those of one call, under the name of the first."""

    def __init__(self, parameters: list[_Parameter], compressed: set[str]) -> None:
        self.parameters = parameters
        self.widths = [parameter.width for parameter in parameters]
        self.is_coded = [parameter.name in compressed for parameter in parameters]
        self.coded = [parameter for parameter in parameters if parameter.name in compressed]
        self.name = self.coded[0].name if self.coded else ""

    def residuals(self, table: Any) -> dict[str, Any]:
        """By parameters, of those of a call, (ranks, widths)."""
        columns = table.split([parameter.width for parameter in self.coded], 1)
        return {each.name: each.whole(part).clone() for each, part in zip(self.coded, columns, strict=True)}

    def table(self, residuals: Mapping[str, Any]) -> Any:
        """residuals()'s inverse; those that are missing are zero."""
        columns = []
        for each in self.coded:
            found = residuals.get(each.name)
            columns.append(each.table(torch.zeros(math.prod(each.shape)) if found is None else found))
        return torch.cat(columns, 1)


class Shards(Compression):
    """Each module under fully_shard gets a reduce_scatter of its own.

    A step is one backward(), whichever modules it reduces. A rank sees only its own part of an average, and
    another replica of HSDP other residuals. Whether a step was finite is therefore agreed once a step by all
    ranks, before its residuals are used or saved.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        codec: Codec | PowerSGD | str,
        error_feedback: ErrorFeedback | bool | None,
        exempt: Iterable[str] | Rule,
    ) -> None:
        modules = sharded_modules(model)
        groups = [_param_group(module) for module in modules]
        if any(isinstance(group._reduce_scatter_comm, _ReduceScatter) for group in groups):
            raise ValueError(
                "`model` is compressed already: an earlier compress() has returned its Compression"
            )
        process_groups = {id(group._reduce_scatter_process_group) for group in groups}
        if len(process_groups) != 1:
            raise ValueError(
                f"modules are sharded over {len(process_groups)} process groups: compress() takes a model"
                " that is sharded over one"
            )
        comm = communicator_of(groups[0]._reduce_scatter_process_group)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(comm, named, codec, error_feedback, exempt, "reduce_scatter")
        if self._feedback is not None and any(_divides_before(group) for group in groups):
            raise ValueError(
                "gradients of a module cross as float16, which FSDP2 divides before it sums them, so that"
                " residuals would have another unit: pass reduce_dtype=torch.float32, or error_feedback=False"
            )
        self._sharing = [comm]  # whose ranks have all averages of a step between them
        if self._feedback is not None and hasattr(groups[0].mesh_info, "replicate_process_group"):
            self._sharing.append(communicator_of(groups[0]._all_reduce_process_group))
        self._hold()
        names = {id(p): name for name, p in named.items()}
        self._units = []
        for module, group in zip(modules, groups, strict=True):
            parameters = [
                _Parameter(
                    names[id(p.sharded_param)], tuple(p.sharded_param.shape), p.fsdp_placement.dim, comm.size
                )
                for p in group.fsdp_params
                if p.sharded_param.requires_grad
            ]
            unit = _Unit(parameters, self._compressed)
            self._units.append(unit)
            module.set_custom_reduce_scatter(_ReduceScatter(self, unit))
        self._pass: int | None = None  # backward(), of the step that has not ended
        self._is_finite = True  # this rank's part of the averages of this step

    def reduce(self, unit: _Unit, out: Any, x: Any, op: Any) -> None:
        if torch._C._current_graph_task_id() != self._pass:
            self._end_step()
            self._pass = torch._C._current_graph_task_id()
            if self._feedback is not None:
                self._feedback.begin_step()
        kind, factor = _operator(op)
        whole = x.numel() == self._comm.size * sum(unit.widths)  # else gradients are missing
        if not whole or not unit.coded:
            self._count([], [x])
            self._comm.reduce_scatter(x, out=out, op=kind, tag="compress: a module uncompressed")
        elif all(unit.is_coded):
            self._reduce_coded(unit, out, x, kind)
        else:
            parts, outs = x.view(self._comm.size, -1).split(unit.widths, 1), out.split(unit.widths)
            for coded in (True, False):
                chosen = [i for i, is_coded in enumerate(unit.is_coded) if is_coded == coded]
                data = torch.cat([parts[i] for i in chosen], 1).view(-1)
                result = data.new_empty(data.numel() // self._comm.size)
                if coded:
                    self._reduce_coded(unit, result, data, kind)
                else:
                    self._count([], [data])
                    self._comm.reduce_scatter(data, out=result, op=kind, tag="compress: exempt parameters")
                for i, part in zip(chosen, result.split([unit.widths[i] for i in chosen]), strict=True):
                    outs[i].copy_(part)
        if factor != 1.0:
            out.mul_(factor)
        self._is_finite = self._is_finite and (self._feedback is None or bool(out.isfinite().all()))

    def _reduce_coded(self, unit: _Unit, out: Any, x: Any, op: Any) -> None:
        self._count([x], [])
        step = self._next_step()
        self._comm.reduce_scatter(x, out=out, op=op, codec=self._codec, step=step, tag=unit.name)

    def _end_step(self) -> None:
        if self._feedback is not None and self._pass is not None:
            bad = np.array([not self._is_finite], np.int64)
            for comm in self._sharing:
                bad = comm.all_reduce(bad, op="max", tag="compress: whether the step was finite")
            if bad[0]:
                self._feedback.skip()
        self._pass = None
        self._is_finite = True

    def _residuals(self) -> dict[str, Any]:
        self._end_step()
        found: dict[str, Any] = {}
        state = super()._residuals()
        for unit in self._units:
            if unit.name in state:
                found |= unit.residuals(torch.as_tensor(state[unit.name]).view(self._comm.size, -1))
        return found

    def _load_residuals(self, residuals: list[Mapping[str, Any]]) -> None:
        mean = ErrorFeedback()  # of the old ranks, checked
        mean.load_state_dict(residuals)
        merged = {name: torch.as_tensor(residual) for name, residual in mean.state_dict().items()}
        units = [unit for unit in self._units if any(each.name in merged for each in unit.coded)]
        super()._load_residuals([{unit.name: unit.table(merged).reshape(-1) for unit in units}])
        self._pass = None
        self._is_finite = True


class _ReduceScatter:
    """What FSDP2 calls, by the protocol of set_custom_reduce_scatter()."""

    def __init__(self, owner: Shards, unit: _Unit) -> None:
        self._owner, self._unit = owner, unit

    def allocate(self, size: Any, *, dtype: Any, device: Any) -> Any:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Any, input_tensor: Any, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        self._owner.reduce(self._unit, output_tensor, input_tensor, op)
        return completed([output_tensor]) if async_op else None


def sharded_modules(model: torch.nn.Module) -> list[Any]:
    """The modules under fully_shard that have parameters of their own to reduce."""
    found = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return [module for module in found if module._get_fsdp_state()._fsdp_param_groups]


def _param_group(module: Any) -> Any:
    groups = module._get_fsdp_state()._fsdp_param_groups
    if len(groups) > 1:
        raise ValueError("a module has parameters on several meshes, for which torch takes no reduce_scatter")
    if not hasattr(groups[0].mesh_info, "shard_process_group"):
        raise ValueError("a module is replicated and not sharded: use DistributedDataParallel there")
    return groups[0]


def _divides_before(group: Any) -> bool:
    policy, own = group.mp_policy, group.fsdp_params[0].sharded_param.dtype
    return bool((policy.reduce_dtype or policy.param_dtype or own) == torch.float16)


def _operator(op: Any) -> tuple[Any, float]:
    """pycomm's operator, and what the result is then multiplied by: error feedback takes no premul_sum."""
    kind = getattr(op, "op", op)
    if kind == ReduceOp.PREMUL_SUM:
        return "sum", float(op.factor)
    if kind in (ReduceOp.SUM, ReduceOp.AVG):
        return ("sum" if kind == ReduceOp.SUM else "avg"), 1.0
    raise ValueError(f"a codec carries sums and averages, not {op}")
