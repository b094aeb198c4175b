"""Tests that need a GPU: `make test-gpu`. Without a device, or without the kernels, they are skipped."""

import pytest

import pycomm.cuda


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        pycomm.cuda.arrays.native()
    except RuntimeError as error:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=str(error)))
