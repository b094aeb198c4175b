"""Compressed gradients for models that torch itself makes parallel."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.parallel import DistributedDataParallel

from pycomm.codecs.feedback import ErrorFeedback, Rule, one_dimensional
from pycomm.codecs.kinds import Codec
from pycomm.codecs.powersgd import PowerSGD
from pycomm.torch.compression import Compression
from pycomm.torch.replicas import Replicas
from pycomm.torch.shards import Shards, sharded_modules


def compress(
    model: torch.nn.Module,
    codec: Codec | PowerSGD | str,
    *,
    error_feedback: ErrorFeedback | bool | None = None,
    exempt: Iterable[str] | Rule = one_dimensional,
) -> Compression:
    """Lets the gradients of a parallel model cross compressed; the training loop stays as it is.

    Returns what has the checkpoints, the loss scale and the bytes.

    `model`: a DistributedDataParallel, whose buckets pycomm then averages in a communication hook; or a model
    with modules under fully_shard (FSDP2), whose gradients pycomm then reduce-scatters. Its process group is
    pycomm's. All ranks make this call alike, before the first backward(). Parameters that are frozen
    (requires_grad=False) have no part in it: freeze them before this call.

    `codec`: a name or object of pycomm.codecs; with fully_shard one that reduce_scatter carries, which
    "topk", "shared_int" and "powersgd" are not. `error_feedback`: as in GradientReducer. An ErrorFeedback or
    PowerSGD that you pass is of this model alone. `exempt`: which parameters are averaged uncompressed: names
    or patterns as in named_parameters(), such as "*.bias" or "embedding.*"; or a rule of a name and a shape.
    By default those of at most one dimension: biases, and the gains of norms. What an ErrorFeedback that you
    pass exempts by its own rule is uncompressed as well.

    Averages have the same bits on all ranks. If those of a step are not finite, the step leaves residuals as
    they were. With fully_shard, a module of which some parameters have no gradient in a step is reduced
    uncompressed in that step, and HSDP's all_reduce between replicas always is.

    Raises TypeError or ValueError, and changes nothing, for another model, one that is compressed already, or
    another process group; for a codec that cannot carry the call; for parameters to be compressed that are
    not float32, float16 or bfloat16; for a pattern that matches no parameter; and for an ErrorFeedback or
    PowerSGD that another model has. With DistributedDataParallel also for sparse gradients, and for
    parameters in memory_format=torch.channels_last under error feedback or PowerSGD.
    """
    if isinstance(model, DistributedDataParallel):
        return Replicas(model, codec, error_feedback, exempt)
    if isinstance(model, torch.nn.Module) and sharded_modules(model):
        return Shards(model, codec, error_feedback, exempt)
    raise TypeError(
        f"`model` is a {type(model).__name__} that torch does not make parallel: wrap it in"
        " DistributedDataParallel, or apply fully_shard, before compress()"
    )
