"""What was measured, for people (rich tables in nccl-tests' columns) and for programs (JSON, CSV)."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import pycomm
from pycomm import _native
from pycomm.bench.measure import Row, summarize

FORMS = ("out_of_place", "in_place")


def machine() -> str:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, Linux {platform.release()}, {_native.isa()}, pycomm {pycomm.__version__}"


def engines(ranks: int, versions: dict[str, str]) -> str:
    peers = [f"{version} ({name})" for name, version in versions.items() if name != "pycomm"]
    return f"{ranks} rank{'s' * (ranks > 1)}" + (f", beside {', '.join(peers)}" if peers else "")


def as_json(rows: Sequence[Row], versions: dict[str, str]) -> str:
    return json.dumps(
        {
            "machine": machine(),
            "versions": versions,
            "rows": [row.as_dict() for row in rows],
            "summary": summarize(rows),
        },
        indent=1,
    )


def write_csv(rows: Sequence[Row], file: TextIO) -> None:
    peers = sorted({name for row in rows for name in row.peers})
    columns = [
        "collective",
        "bytes",
        "count",
        "dtype",
        "op",
        "ranks",
        "algorithm",
        "buffers",
        "persistent",
        "codec",
    ]
    columns += [
        f"{form}_{what}" for form in FORMS for what in ("median_us", "min_us", "p99_us", "wait_us", "wrong")
    ]
    writer = csv.writer(file)
    writer.writerow([*columns, *(f"{peer}_us" for peer in peers)])
    for row in rows:
        found: dict[str, Any] = row.as_dict()
        for form, times in row.forms.items():
            found |= {f"{form}_{key}": value for key, value in vars(times).items()}
        writer.writerow([*(found.get(c, "") for c in columns), *(row.peers.get(peer, "") for peer in peers)])


def table(title: str, peers: bool) -> Table:
    shown = Table(
        title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in ("size(B)", "count", "type", "redop", "root", "algorithm", "buffers"):
        shown.add_column(name, justify="left" if name in ("algorithm", "buffers") else "right")
    for form in ("out-of-place", "in-place"):
        for name in ("time(us) (min, p99)", "algbw", "busbw", "#wrong"):
            shown.add_column(f"{form}\n{name}" if name.startswith("time") else f"\n{name}", justify="right")
    shown.add_column("wait(us)", justify="right")
    if peers:
        shown.add_column("peers: time(us), ratio", justify="left")
    return shown


def add_rows(shown: Table, rows: Sequence[Row]) -> None:
    for row in rows:
        cells = [str(row.bytes), str(row.count), row.dtype, row.op, str(row.root), row.algorithm]
        cells.append(row.way)
        for form in FORMS:
            if form not in row.forms:
                cells += ["-"] * 4
                continue
            times = row.forms[form]
            us = times.median_us
            cells.append(f"{us:.2f} ({times.min_us:.2f}, {times.p99_us:.2f})")
            cells += [f"{row.algbw(us):.2f}", f"{row.busbw(us):.2f}", str(times.wrong)]
        cells.append(f"{row.wait_us:.2f}")
        cells.append("  ".join(f"{name} {us:.2f}, {row.ratios[name]:.2f}x" for name, us in row.peers.items()))
        shown.add_row(*cells[: len(shown.columns)])


def print_summary(console: Console, rows: Sequence[Row]) -> None:
    summary = summarize(rows)
    if not summary:
        return
    shown = Table(title="peer's time over pycomm's", title_justify="left", header_style="bold")
    for name in ("collective", "buffers", "peer", "sizes", "geometric mean", "minimum"):
        shown.add_column(name, justify="right" if name in ("geometric mean", "minimum") else "left")
    for found in summary:
        shown.add_row(
            found["collective"],
            " ".join(
                [found["buffers"], *["persistent"] * found["persistent"], *filter(None, [found["codec"]])]
            ),
            found["peer"],
            f"{found['from_bytes']} to {found['to_bytes']}",
            f"{found['geometric_mean']:.2f}x",
            f"{found['min']:.2f}x at {found['min_at_bytes']}",
        )
    console.print(shown)
