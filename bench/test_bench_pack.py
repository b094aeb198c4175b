"""pytest-benchmark of pack and unpack: `pytest bench/test_bench_pack.py --benchmark-only`.

The cases of `pycomm bench kernels pack`, with torch's ways where torch can be imported.
"""

from typing import Any

import pytest

from pycomm.bench.kernels import Case, Cpu
from pycomm.bench.pack_cases import CASTS, cases
from pycomm.bench.shapes import MODELS

KERNELS = [
    name
    for dtype in CASTS
    for name in (
        f"pack float32 to {dtype}",
        f"pack float32 to {dtype}, scale",
        f"pack float32 to {dtype}, scale, statistics",
        f"unpack {dtype} to float32",
        f"unpack {dtype} to float32, scale",
    )
]


@pytest.fixture(scope="module", params=MODELS)
def found(request: pytest.FixtureRequest) -> dict[str, Case]:
    return {case.kernel: case for case in cases(Cpu(), [request.param])}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(benchmark: Any, found: dict[str, Case], kernel: str) -> None:
    case = found[kernel]
    benchmark.group = f"{case.workload}: {kernel}"
    benchmark.extra_info["bytes"] = case.bytes
    benchmark(case.run)


@pytest.mark.parametrize("kernel", KERNELS)
def test_fastest_way_of_torch(benchmark: Any, found: dict[str, Case], kernel: str) -> None:
    case = found[kernel]
    if not case.rivals:
        pytest.skip("no torch here, or nothing of it to compare")
    device = Cpu()
    fastest = min(case.rivals, key=lambda name: min(device.seconds(case.rivals[name], 1) for _ in range(3)))
    benchmark.group = f"{case.workload}: {kernel}"
    benchmark.extra_info["way"] = fastest
    benchmark(case.rivals[fastest])
