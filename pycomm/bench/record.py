"""The results for programs: JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pycomm.bench import machine
from pycomm.bench.rows import FORMS, Row, Times


class Record:
    """The circumstances of a run that begins now."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._head = {
            "machine": machine.describe(),
            "processor": machine.as_dict(),
            "command": shlex.join(["pycomm", *sys.argv[1:]]),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "settings": {**settings, "environment": environment()},
        }
        self._begun = time.monotonic()

    def as_json(
        self,
        versions: Mapping[str, str],
        rows: Sequence[Mapping[str, Any]],
        ended: str,
        **more: Any,
    ) -> str:
        """One row per line, so that records can be compared with diff. `ended`: how the run ended."""
        head = {**self._head, "seconds": round(time.monotonic() - self._begun, 1), "ended": ended}
        head |= {"versions": dict(versions), **more}
        parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        parts.append('"rows": [' + (f"\n  {lines}\n " if lines else "") + "]")
        return "{\n " + ",\n ".join(parts) + "\n}"


def environment() -> dict[str, str]:
    """The variables that affect the results."""
    prefixes = (
        "PYCOMM_",
        "OMPI_",
        "I_MPI_",
        "MPICH_",
        "MPIR_CVAR_",
        "UCX_",
        "FI_",
        "GLOO_",
        "OMP_",
        "GLIBC_TUNABLES",
    )
    secret = ("PYCOMM_SECRET", "PYCOMM_JOB", "PYCOMM_TAKEN")
    found = {
        name: value for name, value in os.environ.items() if name.startswith(prefixes) and name not in secret
    }
    return dict(sorted(found.items()))


def as_csv(rows: Sequence[Row]) -> str:
    """One line per row, with the figures of each engine and form; pycomm's have no name before them."""
    columns = [
        "collective",
        "bytes",
        "count",
        "dtype",
        "op",
        "ranks",
        "algorithm",
        "default",
        "buffers",
        "persistent",
    ]
    columns += ["codec", "offsets", "cores"]
    peers = list(dict.fromkeys(peer for row in rows for peer in row.beside))
    lines = []
    for row in rows:
        line: dict[str, Any] = {name: getattr(row, name) for name in columns}
        for name in ("offsets", "cores"):
            line[name] = ",".join(map(str, line[name] or ()))  # as in the options
        for form, times in row.forms.items():
            line |= _figures(row, form, times)
        for peer, forms in row.beside.items():
            for form, times in forms.items():
                line |= {f"{peer}_{name}": value for name, value in _figures(row, form, times).items()}
                if form in row.ratios[peer]:
                    line[f"{peer}_{form}_ratio"] = row.ratios[peer][form]
        lines.append(line)
    for engine in ["", *(f"{peer}_" for peer in peers)]:
        for form in FORMS:
            columns += [f"{engine}{form}_{name}" for name in FIGURES]
            columns += [f"{engine}{form}_ratio"] if engine else []
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


FIGURES = (
    "median_us",
    "min_us",
    "p99_us",
    "call_median_us",
    "call_p99_us",
    "wait_us",
    "wrong",
    "algbw",
    "busbw",
)


def _figures(row: Row, form: str, times: Times) -> dict[str, Any]:
    figures = times.as_dict() | {"algbw": row.algbw(times.median_us), "busbw": row.busbw(times.median_us)}
    return {f"{form}_{name}": figures[name] for name in FIGURES}
