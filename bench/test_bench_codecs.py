"""pytest-benchmark of codecs and top-k: `pytest bench/test_bench_codecs.py --benchmark-only`.

The cases of `pycomm bench kernels codec topk`, with torch's ways where torch can be imported.
"""

from typing import Any

import pytest

from pycomm.bench import codec_cases, topk_cases
from pycomm.bench.kernels import Case, Cpu
from pycomm.bench.shapes import MODELS

KERNELS = [
    f"{kind} {what}"
    for kind in codec_cases.KINDS
    for what in ("encode", "encode, stochastic", "decode", "decode and add")
    if (kind, what) != ("sign", "encode, stochastic")
] + ["topk 1%"]


@pytest.fixture(scope="module", params=MODELS)
def found(request: pytest.FixtureRequest) -> dict[str, Case]:
    device = Cpu()
    families = (codec_cases, topk_cases)
    return {case.kernel: case for family in families for case in family.cases(device, [request.param])}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(benchmark: Any, found: dict[str, Case], kernel: str) -> None:
    case = found[kernel]
    benchmark.group = f"{case.workload}: {kernel}"
    benchmark.extra_info["bytes"] = case.bytes
    benchmark(case.run)


@pytest.mark.parametrize("way", ["torch.topk", "sampled threshold"])
def test_way_of_torch(benchmark: Any, found: dict[str, Case], way: str) -> None:
    case = found["topk 1%"]
    if way not in case.rivals:
        pytest.skip("no torch here")
    benchmark.group = f"{case.workload}: {case.kernel}"
    benchmark(case.rivals[way])
