"""How long a DDP step takes on pycomm, on Gloo and with mpi4py in a hook, and how much is communication.

    mpiexec -n 2 python bench/ddp_step.py --model resnet50          # all three: needs mpi4py
    python -m pycomm run -n 2 bench/ddp_step.py --model gpt2_small  # without mpi4py

The gradients have the shapes of a real model, and what computes them is made up: backward() waits for each
gradient as long as its share of the elements says, all together 0, 1 and 3 times as long as pycomm takes to
all_reduce as many elements in pieces of 25 MiB, which is DDP's bucket. *elsewhere*: an accelerator computes,
and the rank sleeps meanwhile. *here*: the rank multiplies matrices, so that where no core is spare
communication takes its time from them.

Each engine is a DDP of its own with gradients of its own. All take steps in turn, in an order shuffled each
round; a step begins after a barrier and lasts as long as on the slowest rank. *none* is DDP without
communication. Ranks are not pinned, as under torchrun: Gloo is slower on one core.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

import pycomm
import pycomm.torch
from pycomm.bench import machine
from pycomm.bench.shapes import MODELS, parameters
from pycomm.torch.collectives import communicator_of

TIMES = (0, 1, 3)  # computation, in units of pycomm's communication
SIDE = 96  # of the matrices that are multiplied


class Computation:
    """What a step's backward() takes besides DDP."""

    def __init__(self) -> None:
        self.here = False
        self.seconds_per_element = 0.0
        self._matrix = torch.ones(SIDE, SIDE)
        self._out = torch.empty(SIDE, SIDE)
        self._unit = 0.0
        self._owed = 0.0

    def calibrate(self) -> None:
        """How long one multiplication takes while all ranks multiply."""
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            self._multiply(200)
            times.append((time.perf_counter() - begin) / 200)
        self._unit = statistics.median(times)

    def run(self, elements: int) -> None:
        self._owed += elements * self.seconds_per_element
        if self.here:
            units = int(self._owed / self._unit)
            self._multiply(units)
            self._owed -= units * self._unit
        elif self._owed > 0:
            begin = time.perf_counter()
            time.sleep(self._owed)
            self._owed -= (
                time.perf_counter() - begin
            )  # a sleep is longer than it should be: the next is shorter

    def _multiply(self, times: int) -> None:
        for _ in range(times):
            torch.mm(self._matrix, self._matrix, out=self._out)


class Layer(torch.autograd.Function):
    """Passes its input on; its backward takes time and has a gradient at hand."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, gradient: Any, computation: Computation) -> Any:
        ctx.gradient, ctx.computation = gradient, computation
        return x.clone()

    @staticmethod
    def backward(ctx: Any, above: Any) -> Any:
        ctx.computation.run(ctx.gradient.numel())
        return above, ctx.gradient, None, None


class Model(torch.nn.Module):
    def __init__(self, gradients: list[Any], computation: Computation) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.empty_like(x) for x in gradients)
        self._gradients = gradients
        self._computation = computation

    def forward(self, x: Any) -> Any:
        for weight, gradient in zip(self.weights, self._gradients, strict=True):
            x = Layer.apply(x, weight, gradient, self._computation)
        return x


def no_communication(_, bucket):  # torch would read the annotations of a hook
    return completed(bucket.buffer())


def mpi(world, bucket):
    from mpi4py import MPI

    buffer = bucket.buffer()
    world.Allreduce(MPI.IN_PLACE, buffer.numpy())
    return completed(buffer.div_(world.size))


def completed(value: Any) -> Any:
    future = torch.futures.Future()
    future.set_result(value)
    return future


def replicas(gradients: list[Any], computation: Computation) -> dict[str, Any]:
    """A DDP for each engine, by its name."""

    def ddp(backend: str, hook: Callable[..., Any] | None = None, state: Any = None) -> Any:
        group = dist.new_group(backend=backend)
        model = DistributedDataParallel(
            Model(gradients, computation), process_group=group, gradient_as_bucket_view=True
        )
        if hook is not None:
            model.register_comm_hook(state, hook)
        return model

    found = {"none": ddp("gloo", no_communication), "pycomm": ddp("pycomm"), "gloo": ddp("gloo")}
    try:
        from mpi4py import MPI
    except ImportError:
        return found
    if MPI.COMM_WORLD.size == dist.get_world_size():  # else started by something that is not mpiexec
        found["mpi"] = ddp("gloo", mpi, MPI.COMM_WORLD)
    return found


@dataclass
class Result:
    model: str
    computation: str  # elsewhere, here
    times: int
    engine: str
    step_ms: float
    exposed: float  # what the step takes beyond that without communication, as a part of it
    ratio: float  # to pycomm's step
    stolen_ms: float | None  # CPU time of pycomm's progress thread in a step


def measure(
    engines: dict[str, Any], computation: Computation, comm: pycomm.Communicator, rounds: int
) -> tuple[dict[str, float], float]:
    """Medians of the engines' steps in seconds; and the CPU time of pycomm's progress thread in a step."""
    x = torch.ones(1, requires_grad=True)
    steps: dict[str, list[float]] = {name: [] for name in engines}
    stolen = []
    group = pycomm_group(engines)
    for round_ in range(-2, rounds):  # DDP arranges its buckets anew after its first step
        order = list(engines)
        random.Random(round_).shuffle(order)
        for name in order:
            engines[name].zero_grad(set_to_none=True)
            before = group.progress_seconds
            comm.barrier()
            begin = time.perf_counter()
            engines[name](x).sum().backward()
            mine = time.perf_counter() - begin
            if round_ >= 0:
                steps[name].append(mine)
                if name == "pycomm":
                    stolen.append(group.progress_seconds - before)
    longest = {name: torch.tensor(times, dtype=torch.float64) for name, times in steps.items()}
    for times in longest.values():
        comm.all_reduce(times, op="max")
    return {name: times.median().item() for name, times in longest.items()}, statistics.median(stolen)


def communication_s(elements: int, group: pycomm.Communicator, rounds: int) -> float:
    pieces = torch.ones(elements).split(25 * 2**20 // 4)
    times = []
    for _ in range(rounds):
        group.barrier()
        begin = time.perf_counter()
        for piece in pieces:
            group.all_reduce(piece, op="avg")
        times.append(time.perf_counter() - begin)
    return group.all_reduce(torch.tensor(times), op="max").median().item()


def pycomm_group(engines: dict[str, Any]) -> pycomm.Communicator:
    return communicator_of(engines["pycomm"].process_group)


def results(model: str, comm: pycomm.Communicator, rounds: int) -> list[Result]:
    computation = Computation()
    gradients = [torch.full(each.shape, 1.0 + comm.rank) for each in parameters(model)]
    engines = replicas(gradients, computation)
    elements = sum(x.numel() for x in gradients)
    comm.barrier()
    computation.calibrate()
    communication = communication_s(elements, pycomm_group(engines), rounds)
    found = []
    for where in ("elsewhere", "here"):
        computation.here = where == "here"
        for times in TIMES:
            computation.seconds_per_element = times * communication / elements
            steps, stolen = measure(engines, computation, comm, rounds)
            for name, step in steps.items():
                found.append(
                    Result(
                        model,
                        where,
                        times,
                        name,
                        step * 1e3,
                        1 - steps["none"] / step,
                        step / steps["pycomm"],
                        stolen * 1e3 if name == "pycomm" else None,
                    )
                )
    wrong = sum(int((p.grad != (comm.size + 1) / 2).sum()) for p in engines["pycomm"].parameters())
    if wrong:
        raise SystemExit(f"{wrong} elements of the averages are wrong")
    return found


def show(found: list[Result], ranks: int) -> None:
    console = Console()
    for model in dict.fromkeys(each.model for each in found):
        table = Table(title=f"DDP step, gradients of {MODELS[model]}, {ranks} ranks")
        for heading in ("computation", "engine", "step, ms", "exposed", "step / pycomm's", "stolen, ms"):
            table.add_column(heading, justify="left" if heading in ("computation", "engine") else "right")
        for each in (each for each in found if each.model == model):
            table.add_row(
                f"{each.times}x {each.computation}",
                each.engine,
                f"{each.step_ms:.1f}",
                f"{100 * each.exposed:.0f} %",
                f"{each.ratio:.2f}",
                "" if each.stolen_ms is None else f"{each.stolen_ms:.1f}",
                end_section=each.engine == found[-1].engine,
            )
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    torch.set_num_threads(1)  # each rank has one core
    comm = pycomm.init()
    # A folder of rank 0's, in which the groups meet.
    folder = comm.broadcast_object(tempfile.mkdtemp() if comm.rank == 0 else None)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=comm.rank, world_size=comm.size)
    found = []
    for model in MODELS if options.model == "all" else [options.model]:
        found += results(model, comm, options.rounds)
    if comm.rank == 0:
        show(found, comm.size)
        if options.json:
            record = {"machine": machine.as_dict(), "ranks": comm.size, "torch": torch.__version__}
            options.json.write_text(json.dumps(record | {"results": [asdict(x) for x in found]}, indent=1))
    dist.destroy_process_group()
    comm.close()


if __name__ == "__main__":
    main()
