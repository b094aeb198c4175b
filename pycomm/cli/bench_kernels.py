"""`pycomm bench kernels`: measures the inner loops against the bandwidth of a copy."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable

from pycomm.cli import output
from pycomm.cli.main import fail


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", nargs="*", help="families of kernels (all)")
    parser.add_argument("--workloads", metavar="NAMES", help="resnet50,gpt2_small (both)")
    parser.add_argument("--device", default="cpu", help="where they run: cpu, cuda (cpu)")
    output.add_options(parser)


def run(args: argparse.Namespace) -> int:
    try:
        output.check(args, "pycomm bench kernels")
    except ValueError as error:
        return fail(str(error))
    from rich.progress import Progress

    from pycomm.bench import kernels as k
    from pycomm.bench import kernels_report as report
    from pycomm.bench.shapes import MODELS

    try:
        _known([args.device], list(k.DEVICES), "--device: there is no")
        modules = k.families(args.device)
        families = _known(args.family or list(modules), list(modules), "there is no family")
        workloads = args.workloads.split(",") if args.workloads else list(MODELS)
        _known(workloads, list(MODELS), "--workloads: there is no")
    except ValueError as error:
        return fail(str(error))

    console, errors = output.consoles(args, 200)
    try:
        device = k.DEVICES[args.device]()
        about = device.describe()
    except ImportError:
        return fail(
            f"pycomm bench kernels --device {args.device} needs torch, for its memory and for comparison"
        )
    except (RuntimeError, ValueError) as error:
        return fail(str(error))
    console.print(about, highlight=False)
    if importlib.util.find_spec("ml_dtypes") is None:
        console.print("bfloat16 and float8 are left out: pip install ml_dtypes for them", highlight=False)
    rows: list[k.Row] = []
    with Progress(console=errors, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("measuring", total=len(set(families)))
        for row in k.measure(device, families, workloads, modules):
            rows.append(row)
            begun = len({row.family for row in rows}) - 1
            words = f"{row.workload}: {row.kernel}"
            progress.update(task, description=words, completed=begun, refresh=True)
    console.print(report.table(rows))
    outputs: dict[str, Callable[[str], None]] = {
        "json": lambda path: output.write_text(path, report.as_json(rows, about)),
        "plot": lambda path: report.plot(rows, path, about),
    }
    return output.not_written([*output.write(args, outputs), *output.lost(console)])


def _known(wanted: list[str], known: list[str], what: str) -> list[str]:
    for name in wanted:
        if name not in known:
            raise ValueError(f"{what} {name!r}: {', '.join(known)}")
    return wanted
