"""DeepSpeed's all_reduce over shared memory, which its users get on one machine's CPUs; Gloo joins the ranks.

Its extension is compiled when it is first loaded, which takes minutes: load it once before it is measured,
`python -c "from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder as B; B().load()"`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja

import deepspeed
import engine_gloo
import torch
from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

if TYPE_CHECKING:
    from pycomm.bench.workers.data import Array, Case

TYPES = ("float32", "float16", "bfloat16")


class Engine(engine_gloo.Engine):  # type: ignore[misc]
    def __init__(self, rank: int, size: int, directory: str) -> None:
        super().__init__(rank, size, directory)
        # The names of its shared memory derive from these; the directory is unique.
        self.job = Path(directory).name
        os.environ |= {"LOCAL_SIZE": str(size), "MASTER_ADDR": self.job, "MASTER_PORT": "0"}
        extension = ShareMemCommBuilder().load()
        if extension.vector_kernel_level() < 1:
            raise RuntimeError("DeepSpeed's shared memory needs AVX2")
        self.barrier()
        extension.initialize(size, rank)
        self.barrier()
        self.version = f"DeepSpeed {deepspeed.__version__}"

    def bind(
        self, case: Case, form: str, variant: dict[str, Any], x: Array, out: Array
    ) -> tuple[str, dict[str, Any]] | None:
        if case.collective != "all_reduce" or form != "in_place":
            return None
        if case.op != "sum" or case.dtype not in TYPES:
            raise TypeError(f"DeepSpeed's shared memory has no {case.op} of {case.dtype}")
        names = {"x": engine_gloo.tensor(x), "all_reduce_": torch.ops.deepspeed.inference_all_reduce_}
        return "all_reduce_(x)", names

    def start(self, text: str) -> str:
        raise AttributeError("inference_all_reduce_ has no asynchronous form")

    def close(self) -> None:
        self.barrier()
        for left in Path("/dev/shm").glob(f"*{self.job}*"):  # DeepSpeed removes none of them
            left.unlink(missing_ok=True)
        super().close()
