"""pytest-benchmark of the inner loops: `pytest bench/test_bench_kernels.py --benchmark-only -k resnet50`.

The cases of `pycomm bench kernels` on the CPU, with the fastest other implementation: torch's, if torch can
be imported, or zlib.
"""

from __future__ import annotations

from typing import Any

import pytest

from pycomm.bench import codec_cases, lossless_cases, pack_cases, topk_cases
from pycomm.bench.kernels import Case, Cpu
from pycomm.bench.shapes import MODELS

KERNELS = {
    pack_cases: [
        name
        for dtype in pack_cases.CASTS
        for name in (
            f"pack float32 to {dtype}",
            f"pack float32 to {dtype}, scale",
            f"pack float32 to {dtype}, scale, statistics",
            f"unpack {dtype} to float32",
            f"unpack {dtype} to float32, scale",
        )
    ],
    codec_cases: [
        f"{kind} {what}"
        for kind in codec_cases.KINDS
        for what in ("encode", "encode, stochastic", "decode", "decode and add")
        if (kind, what) != ("sign", "encode, stochastic")
    ],
    topk_cases: ["topk 1%"],
    lossless_cases: ["lossless encode", "lossless decode"],
}
ALL = [(model, family, kernel) for model in MODELS for family, names in KERNELS.items() for kernel in names]


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, Case]]:
    """The cases of one family and workload at a time, since their memory is large."""
    return {}


@pytest.fixture(params=ALL, ids=lambda of: f"{of[2]}, {of[0]}")
def case(request: pytest.FixtureRequest, cases: dict[str, dict[str, Case]]) -> Case:
    model, family, kernel = request.param
    key = f"{family.__name__}, {model}"
    if key not in cases:
        cases.clear()
        cases[key] = {case.kernel: case for case in family.cases(Cpu(), [model])}
    return cases[key][kernel]


def test_kernel(benchmark: Any, case: Case) -> None:
    benchmark.group = f"{case.workload}: {case.kernel}"
    benchmark.extra_info["bytes"] = case.bytes
    benchmark(case.run)


def test_fastest_other_way(benchmark: Any, case: Case) -> None:
    if not case.rivals:
        pytest.skip("no torch here, or nothing to compare")
    device = Cpu()
    fastest = min(case.rivals, key=lambda name: min(device.seconds(case.rivals[name], 1) for _ in range(3)))
    benchmark.group = f"{case.workload}: {case.kernel}"
    benchmark.extra_info["way"] = fastest
    benchmark(case.rivals[fastest])
