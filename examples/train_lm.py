"""The demo: a language model trained on 2 ranks, compared with the same run on 1 rank.

    python examples/train_lm.py

The training itself is `train` in reducer_numpy.py, some thirty lines. This file starts it with `pycomm run`,
once on one rank and once on several, with the same seed and the same global batch, for as many steps as take
about a minute here. It shows the progress, and sums up in tables and in demo.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lm.bandwidth import bandwidth_table, render
from lm.plot import draw
from lm.train import GLOBAL_BATCH, STEPS
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

import pycomm

SECONDS = 45  # of both runs together: with the rest of the demo a minute
FEWEST_STEPS = 60  # with fewer steps the loss has hardly begun to fall
TRIED_STEPS = 6  # steps to measure the time of one

# A rank is a process on its own core; with more BLAS threads, a single rank would use the other cores.
ONE_BLAS_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass
class Run:
    """One training run, as reported so far."""

    ranks: int
    start: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"

    def column(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]

    def steps_per_second(self) -> float:
        return len(self.steps) / sum(self.column("seconds"))

    def losses(self) -> list[float]:
        """Those on the whole batch of each step, once the run has ended."""
        return list(self.end["losses"])

    def hear(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "start":
                self.start = event
            case "step":
                self.steps.append(event)
            case "end":
                self.end = event


def events(ranks: int, steps: int) -> Iterator[dict[str, Any]]:
    """Trains on `ranks` ranks, each a process; yields the reports of rank 0."""
    command = [sys.executable, "-m", "pycomm", "run", "-n", str(ranks)]
    command += ["-m", "lm.rank", "--steps", str(steps)]
    others = []  # lines that are not reports: warnings, a traceback
    with subprocess.Popen(
        command,
        cwd=Path(__file__).parent,
        env=os.environ | ONE_BLAS_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            _, brace, report = line.partition('{"event"')  # `pycomm run` puts the rank before each line
            if brace:
                yield json.loads(brace + report)
            else:
                others.append(line)
    if process.returncode:
        raise SystemExit("".join(others) + f"`{' '.join(command[1:])}` ended with code {process.returncode}")


def affordable_steps(seconds_a_step: float) -> int:
    """How many steps of both runs, which take `seconds_a_step` together, fit into SECONDS; within bounds."""
    return max(FEWEST_STEPS, min(STEPS, int(SECONDS / seconds_a_step)))


def tried_seconds(ranks: int) -> float:
    """The time of a step: the median of a few, since the first ones are slow."""
    run = Run(ranks)
    for event in events(ranks, TRIED_STEPS):
        run.hear(event)
    return float(np.median(run.column("seconds")))


def train_beside(ranks: int, steps: int, console: Console) -> tuple[Run, Run]:
    """Runs the same training on 1 rank and then on `ranks`, and shows the progress."""
    progress = Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
    )
    runs = Run(1), Run(ranks)
    tasks = [progress.add_task(run.label, total=steps, state="[dim]waits[/dim]") for run in runs]
    with progress:
        for run, task in zip(runs, tasks, strict=True):
            for event in events(run.ranks, steps):
                run.hear(event)
                if event["event"] == "step":
                    state = f"loss [bold]{event['loss']:.3f}[/bold]  {run.steps_per_second():5.1f} steps/s"
                    progress.update(task, completed=len(run.steps), state=state)
    return runs


def summary(one: Run, many: Run) -> Group:
    table = Table(title="the same training, alone and data-parallel")
    for heading in ("", one.label, many.label):
        table.add_column(heading, justify="right" if heading else "left")
    speedup = many.steps_per_second() / one.steps_per_second()
    table.add_row("steps per second", f"{one.steps_per_second():.1f}", f"{many.steps_per_second():.1f}")
    table.add_row("speed-up", "", f"[bold green]{speedup:.2f}x[/bold green]")
    last = (f"{np.mean(run.losses()[-20:]):.4f}" for run in (one, many))
    table.add_row("training loss, last 20 steps", *last)
    table.add_row("loss on held-out text", *(f"{run.end['held_out']:.4f}" for run in (one, many)))
    table.add_row("replicas equal, bit for bit", "", "yes" if many.end["replicas_equal"] else "[red]NO[/red]")

    gap = np.abs(np.subtract(one.losses(), many.losses()))
    notes = (
        f"The loss curves differ by at most {gap[:10].max():.1e} in the first 10 steps and {gap.max():.1e} "
        "in all. This is only float rounding: the sum of the gradients associates differently over "
        f"{many.ranks} ranks, and training amplifies a float32's last bit, as it does when one bit of one "
        "parameter is changed on 1 rank. In float64 the same two runs agree to 1e-15 for 200 steps.",
    )
    sample = Panel(Text(many.end["sample"]), title="what the model writes", border_style="dim")
    overlap = [Text(communication(many)), *(Text(note, style="dim") for note in on_shared_cores(many.ranks))]
    return Group(table, *overlap, *(Text(note, style="dim") for note in notes), sample)


def communication(run: Run) -> str:
    """What the trace's report says about a step on rank 0."""
    step = run.end["communication"]
    ms = {part: f"{step[part] * 1e3:.2f} ms" for part in ("communication", "exposed", "late", "stolen")}
    return (
        f"Communication in a step of {step['step'] * 1e3:.1f} ms: {ms['communication']},"
        f" {step['overlap']:.0%} of it while backward computes; {ms['exposed']} exposed, and {ms['late']} of"
        f" waiting for a slower rank. The thread that moves gradients takes {ms['stolen']} of processor time."
    )


def on_shared_cores(ranks: int) -> list[str]:
    """What overlap means where that thread has no core of its own."""
    cores = len(os.sched_getaffinity(0))
    if cores >= 2 * ranks:
        return []
    return [
        f"{ranks} ranks on {cores} cores leave that thread no core of its own: it takes its time from"
        " backward, and gradients count as communicating while they wait for a core. So not all that is"
        " hidden is gained. The speed-up shows what is."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps",
        type=int,
        help=f"training steps (default: as many as take about {SECONDS} s, {FEWEST_STEPS} to {STEPS})",
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks, at least 2 (default: %(default)s)")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps}: train at least one")
    if options.ranks < 2 or GLOBAL_BATCH % options.ranks:
        parser.error(
            f"--ranks {options.ranks}: at least 2, and a divisor of the global batch of {GLOBAL_BATCH} rows"
        )

    console = Console()
    console.print(
        "A byte-level language model learns from the sources of Python's own standard library, "
        f"{GLOBAL_BATCH} examples a step, first on 1 rank, then on {options.ranks}. "
        "Every rank is a process with one BLAS thread."
    )
    steps = options.steps
    if steps is None:
        with console.status("measuring the time of a step"):
            steps = affordable_steps(tried_seconds(1) + tried_seconds(options.ranks))
        console.print(
            f"{steps} steps: as many as fit into {SECONDS} s here, within {FEWEST_STEPS} to {STEPS}"
        )
    one, many = train_beside(options.ranks, steps, console)
    console.print(f"{many.start['parameters']:,} parameters, {many.start['text_bytes']:,} bytes of text")
    console.print(summary(one, many))
    with console.status("measuring all_reduce"):
        bandwidth = bandwidth_table(options.ranks)
    console.print(render(bandwidth))
    chart = Path("demo.png")
    step = [pycomm.trace.Step.from_dict(data) for data in many.end["typical_step"]]
    draw({run.label: run.losses() for run in (one, many)}, bandwidth, step, chart)
    console.print(f"chart: {chart.resolve()}")


if __name__ == "__main__":
    main()
