"""Shared by the Python tests: the C++ executables that some of them run."""

from collections.abc import Callable
from pathlib import Path

import pytest

BUILD = Path(__file__).parent.parent / "build"


@pytest.fixture(scope="session")
def executable() -> Callable[[str], Path]:
    """`executable("kill_harness")` is the path of the executable built from tests/cpp/kill_harness.cc."""

    def find(name: str) -> Path:
        path = BUILD / "tests" / "cpp" / name
        if not path.exists():
            pytest.skip(f"{path} does not exist: run make build")
        return path

    return find
