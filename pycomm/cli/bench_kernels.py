"""`pycomm bench kernels`: measures the inner loops against the bandwidth of a copy."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from pycomm.cli.main import fail
from pycomm.cli.values import needs


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", nargs="*", help="families of kernels (all)")
    parser.add_argument("--workloads", metavar="NAMES", help="resnet50,gpt2_small (both)")
    parser.add_argument("--device", default="cpu", help="where they run: cpu, cuda (cpu)")
    parser.add_argument("--json", metavar="PATH", help="- is standard output, which then holds nothing else")
    parser.add_argument("--plot", metavar="PATH", help="a PNG")


def run(args: argparse.Namespace) -> int:
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return fail(needs("pycomm bench kernels", "rich"))
    if args.plot and not importlib.util.find_spec("matplotlib"):
        return fail(needs("pycomm bench kernels --plot", "matplotlib"))
    from pycomm.bench import kernels as k
    from pycomm.bench import kernels_report as report
    from pycomm.bench.shapes import MODELS

    try:
        _known([args.device], list(k.DEVICES), "--device: there is no")
        modules = k.families(args.device)
        families = _known(args.family or list(modules), list(modules), "there is no family")
        workloads = args.workloads.split(",") if args.workloads else list(MODELS)
        _known(workloads, list(MODELS), "--workloads: there is no")
        for option, path in (("--json", args.json), ("--plot", args.plot)):
            if path and not Path(path).parent.is_dir():
                raise ValueError(f"{option} {path}: there is no directory {Path(path).parent}")
    except ValueError as error:
        return fail(str(error))

    errors = Console(stderr=True)
    to_terminal = errors.is_terminal if args.json == "-" else sys.stdout.isatty()
    console = Console(stderr=args.json == "-", width=None if to_terminal else 200)
    try:
        device = k.DEVICES[args.device]()
    except ImportError:
        return fail(f"pycomm bench kernels --device {args.device} needs torch, to have memory and a rival")
    except RuntimeError as error:
        return fail(str(error))
    console.print(device.describe(), highlight=False)
    rows: list[k.Row] = []
    with Progress(console=errors, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("measuring", total=None)
        for row in k.measure(device, families, workloads, modules):
            rows.append(row)
            progress.update(task, description=f"{row.workload}: {row.kernel}", refresh=True)
    console.print(report.table(rows))
    text = report.as_json(rows, device.describe())
    if args.json == "-":
        print(text)
    elif args.json:
        Path(args.json).write_text(text + "\n")
    if args.plot:
        report.plot(rows, args.plot, device.describe())
    return 0


def _known(wanted: list[str], known: list[str], what: str) -> list[str]:
    for name in wanted:
        if name not in known:
            raise ValueError(f"{what} {name!r}: {', '.join(known)}")
    return wanted
