"""Three ranks train; one is killed in the middle of backward(). Arguments: what trains, and how many times.

Prints a line of JSON for each survivor each time: the `error` that it was `told`, seconds after the kill; the
`exit` code of its process, which `left` so many seconds after the kill. It is a program of its own, so that
survivors leave an interpreter that runs nothing else.
"""

import gc
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # FSDP2 imports it: once here, not in every rank
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pycomm
import pycomm.torch

SIZE, KILLED, LAYERS = 3, 1, 6
LIMIT = 60.0  # seconds after which a process counts as stuck, and is aborted


def net() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(LAYERS)))


def train(model: Any, layers: Any, optimizer: Any, finish: Callable[[], Any] = lambda: None) -> Iterator[Any]:
    """A step each time that it is asked; yields the layers."""
    while True:
        yield layers
        optimizer.zero_grad()
        model(torch.randn(16, 256)).square().mean().backward()
        finish()
        optimizer.step()


def sgd(model: Any) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def ddp() -> Iterator[Any]:
    layers = net()
    model = DistributedDataParallel(layers, bucket_cap_mb=0.3)
    return train(model, layers, sgd(model))


def fsdp2() -> Iterator[Any]:
    model = net()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return train(model, model, sgd(model))


def reducer(comm: pycomm.Communicator) -> Iterator[Any]:
    model = net()
    averages = pycomm.GradientReducer(list(model.parameters()), comm, bucket_mb=0.3)
    averages.attach()
    return train(model, model, sgd(model), averages.finish)


def survive(way: str, rank: int, run: int, folder: Path) -> None:
    if way == "reducer":
        os.environ.update(PYCOMM_RANK=str(rank), PYCOMM_SIZE=str(SIZE), PYCOMM_JOB=folder.name)
        comm = pycomm.init()
        steps, leave = reducer(comm), comm.close
    else:
        dist.init_process_group(
            "pycomm", store=dist.FileStore(str(folder / "store"), SIZE), rank=rank, world_size=SIZE
        )
        steps, leave = {"ddp": ddp, "fsdp2": fsdp2}[way](), dist.destroy_process_group

    def die(gradient: Any) -> None:
        (folder / "killed").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    layers = next(steps)
    for step in range(1000):
        if rank == KILLED and step == 2 + run % 3:
            layers[run % LAYERS].register_forward_hook(lambda m, x, out: out.register_hook(die) and None)
        try:
            next(steps)
        except RuntimeError as error:
            told = {"at": time.monotonic(), "error": f"{type(error).__name__}: {error}"}
            (folder / f"told-{rank}").write_text(json.dumps(told))
            break
    leave()


def ends_of(pids: list[int]) -> dict[int, tuple[int, float]]:
    """Of each rank, the exit code, and when."""
    ends: dict[int, tuple[int, float]] = {}
    limit = time.monotonic() + LIMIT
    while len(ends) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in ends:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ends[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
                elif time.monotonic() > limit:
                    os.kill(pid, signal.SIGABRT)
        time.sleep(0.002)
    return ends


def main(way: str, runs: int) -> None:
    torch.set_num_threads(1)  # a child of fork has no other threads of torch's pool
    gc.freeze()  # a rank that leaves does not collect, and copy, what all have imported
    for run in range(runs):
        folder = Path(tempfile.mkdtemp(suffix=secrets.token_hex(8)))
        pids = []
        for rank in range(SIZE):
            pids.append(os.fork())
            if pids[-1] == 0:
                survive(way, rank, run, folder)
                return  # and leave the interpreter, as any program does
        ends = ends_of(pids)
        killed = float((folder / "killed").read_text())
        for rank in set(range(SIZE)) - {KILLED}:
            path = folder / f"told-{rank}"
            told = json.loads(path.read_text()) if path.exists() else {"at": killed + LIMIT, "error": ""}
            code, when = ends[rank]
            row = {"error": told["error"], "told": told["at"] - killed, "exit": code, "left": when - killed}
            print(json.dumps(row), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
