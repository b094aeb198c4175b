"""A small transformer learns to continue Python code: data parallel under PyTorch's DDP, on pycomm.

    pycomm run -n 2 examples/ddp_transformer.py
    torchrun --nproc-per-node 2 examples/ddp_transformer.py
    python examples/ddp_transformer.py

    ... --codec int8              # gradients cross compressed
    ... --backend gloo            # the same training on torch's own backend
    ... --checkpoint last.pt      # saves there, and goes on from what is there

Needs PyTorch. Two lines are pycomm's: the import that registers the backend, and compress(). All ranks
together take GLOBAL_BATCH rows a step, so that the training is the same on any number of ranks, but for
dropout.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lm.data import VOCABULARY, rank_batch, read_text, split_text
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import pycomm.torch

SEED = 1
CONTEXT = 64  # bytes that the model sees
GLOBAL_BATCH = 24  # rows of all ranks together: divisible by 1, 2, 3, 4, 6, 8, 12 and 24
LEARNING_RATE = 1e-3
PRINT_EVERY, SAVE_EVERY = 10, 100  # steps


class Transformer(nn.Module):
    """Bytes before -> logits of the next byte, at every position: (rows, CONTEXT) -> (rows, CONTEXT, 128)."""

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(CONTEXT, width)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.logits = nn.Linear(width, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        hidden = self.token(x) + self.position.weight
        return self.logits(self.blocks(hidden, mask=causal, is_causal=True))


def join(backend: str) -> None:
    """Joins the ranks that a launcher has started; without a launcher, a world of 1."""
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def batch(text: Any, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of a step, and the same rows one byte later. It depends on nothing but the step, which
    is therefore all that a checkpoint has to say about the data."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x, y = rank_batch(text, CONTEXT, GLOBAL_BATCH, seed=SEED, step=step, rank=rank, size=size)
    rows = torch.from_numpy(np.concatenate([x, y[:, np.newaxis]], axis=1)).long()
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(x).flatten(0, 1), y.flatten())


def mean_over_ranks(x: torch.Tensor) -> float:
    total = x.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def save(path: Path, step: int, model: nn.Module, optimizer: Any, compression: Any) -> None:
    """Rank 0 writes one file. What differs by rank is gathered: random state, and what a codec still owes."""
    mine = {
        "random": torch.get_rng_state(),
        "compression": None if compression is None else compression.state_dict(),
    }
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(mine, everyones if dist.get_rank() == 0 else None)
    if dist.get_rank() == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        written = path.with_name(path.name + ".part")
        torch.save({**state, "step": step, "ranks": everyones}, written)
        written.replace(path)  # at once: a rank that dies in the middle leaves the last checkpoint whole
    dist.barrier()


def load(path: Path, model: nn.Module, optimizer: Any, compression: Any) -> int:
    """Returns how many steps were made. The number of ranks may be another one than it was."""
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    ranks = state["ranks"]
    same = len(ranks) == dist.get_world_size()
    if same:
        torch.set_rng_state(ranks[dist.get_rank()]["random"])
    if compression is not None and ranks[0]["compression"] is not None:
        owed = [each["compression"] for each in ranks]
        compression.load_state_dict(owed[dist.get_rank()] if same else owed)
    return state["step"]


def exposed(model: DistributedDataParallel, x: torch.Tensor, y: torch.Tensor) -> float:
    """By how many seconds communication makes backward() longer: medians with it and without."""

    def backward() -> float:
        loss = loss_of(model, x, y)
        begin = perf_counter()
        loss.backward()
        return perf_counter() - begin

    with model.no_sync():
        without = median(backward() for _ in range(5))
    return median(backward() for _ in range(5)) - without


def train(options: argparse.Namespace) -> None:
    text, _ = split_text(read_text())
    torch.manual_seed(SEED)
    transformer = Transformer()
    torch.manual_seed(SEED + 1 + dist.get_rank())  # ranks drop out different units
    model = DistributedDataParallel(transformer, gradient_as_bucket_view=True)
    compression = pycomm.torch.compress(model, codec=options.codec) if options.codec else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    path, done = options.checkpoint, 0
    if path is not None and path.exists():
        done = load(path, transformer, optimizer, compression)
    printed, at = perf_counter(), done
    for step in range(done, options.steps):
        loss = loss_of(model, *batch(text, step))
        optimizer.zero_grad(set_to_none=False)  # gradients stay where they are: in the buckets
        loss.backward()  # sends gradients meanwhile
        optimizer.step()

        done = step + 1
        if done % PRINT_EVERY == 0 or done == options.steps:
            mean = mean_over_ranks(loss)
            now = perf_counter()
            if dist.get_rank() == 0:
                tokens = (done - at) * GLOBAL_BATCH * CONTEXT
                print(f"step {done:4}: loss {mean:.4f}, {tokens / (now - printed):6.0f} tokens/s", flush=True)
            printed, at = now, done
        if path is not None and (done % SAVE_EVERY == 0 or done == options.steps):
            save(path, done, transformer, optimizer, compression)

    if dist.get_world_size() > 1:
        seconds = exposed(model, *batch(text, options.steps))
        if dist.get_rank() == 0:
            print(f"communication makes backward() {seconds * 1e3:.1f} ms longer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--backend", choices=("pycomm", "gloo"), default="pycomm")
    parser.add_argument("--codec", help='compresses gradients: "int8", "powersgd", ...; needs backend pycomm')
    parser.add_argument("--checkpoint", type=Path, help="file to save to, and to go on from if it is there")
    options = parser.parse_args()
    join(options.backend)
    train(options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
