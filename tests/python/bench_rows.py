"""Shared by the tests of `pycomm bench`."""

from typing import Any

import pytest

from pycomm.bench.rows import Row, Times
from pycomm.cli import main


def bench(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> tuple[str, str]:
    assert main.main(["bench", *args]) == code
    return capsys.readouterr()


def row(size: int, us: float, peers: dict[str, float], **changes: Any) -> Row:
    """Out of place takes twice as long as in place for pycomm, and three times as long for peers."""
    fields = {"collective": "all_reduce", "count": size // 4, "dtype": "float32", "op": "sum", "ranks": 4}
    forms = {"out_of_place": Times([2 * us]), "in_place": Times([us])}
    fields |= {"algorithm": "ring", "buffers": "plain", "persistent": False, "forms": forms}
    beside = {peer: {"out_of_place": Times([3 * us]), "in_place": Times([us])} for peer, us in peers.items()}
    return Row(**{**fields, "bytes": size, "beside": beside, **changes})
