"""What the Python tests share: the C++ executables that some of them drive."""

from collections.abc import Callable
from pathlib import Path

import pytest

BUILD = Path(__file__).parent.parent / "build"


@pytest.fixture(scope="session")
def executable() -> Callable[[str], Path]:
    """`executable("kill_harness")` is the path of what `make build` made of tests/cpp/kill_harness.cc."""

    def find(name: str) -> Path:
        path = BUILD / "tests" / "cpp" / name
        if not path.exists():
            pytest.skip(f"{path} is not there: make build makes it")
        return path

    return find
