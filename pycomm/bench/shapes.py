"""The tensors of real models, for measuring and testing kernels: each model has a table in bench/shapes/."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

MODELS = {"resnet50": "ResNet-50", "gpt2_small": "GPT-2 small"}


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def parameters(model: str) -> list[Parameter]:
    """Every parameter of the model, in the order of its modules."""
    found = []
    for line in (_folder() / f"{model}.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, *shape = line.split()
            found.append(Parameter(name, tuple(map(int, shape))))
    return found


def _folder() -> Path:
    beside = Path(__file__).parent / "shapes"  # where CMake installs the tables
    return beside if beside.is_dir() else Path(__file__).parents[2] / "bench" / "shapes"
