"""`pycomm bench`: measures the collectives, beside Open MPI, MPICH and Gloo where asked."""

from __future__ import annotations

import argparse
import contextlib

import numpy as np

import pycomm
from pycomm import _native
from pycomm.bench.workers.data import numpy_dtype
from pycomm.cli import output
from pycomm.cli.main import fail
from pycomm.cli.values import at_least, dtype_name, parse_size
from pycomm.codecs import call as codecs_call


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("collective", nargs="*", default=["all_reduce"], help="names, or all (all_reduce)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes (2)")
    parser.add_argument(
        "-b", "--minbytes", default="4", metavar="SIZE", help="smallest size: 4, 1K, 64M, 1G (4)"
    )
    parser.add_argument("-e", "--maxbytes", default="64M", metavar="SIZE", help="largest size (64M)")
    parser.add_argument("-f", "--stepfactor", type=int, default=4, metavar="N", help="from size to size (4)")
    parser.add_argument(
        "-n", "--iters", type=int, metavar="N", help="calls in a repetition (as many as take a few ms)"
    )
    parser.add_argument("-w", "--warmup_iters", type=int, metavar="N", help="calls before each (a tenth)")
    parser.add_argument(
        "-d", "--datatype", default="float32", help="element type, also as nccl-tests has it (float32)"
    )
    parser.add_argument("-o", "--op", default="sum", help="operator of the reductions (sum)")
    parser.add_argument("-c", "--check", type=int, choices=(0, 1), default=1, help="check every element (1)")
    parser.add_argument(
        "--algorithms", default="", metavar="NAMES", help="all, or names; else the library's choice"
    )
    parser.add_argument("--buffers", default="plain", metavar="KINDS", help="plain,symmetric (plain)")
    parser.add_argument("--persistent", action="store_true", help="all_reduce_init as well")
    parser.add_argument(
        "--codecs",
        default="none",
        metavar="NAMES",
        help="as none,bf16,int8 (none)",
    )
    parser.add_argument(
        "--vs",
        default="",
        metavar="PEERS",
        help="mpi,gloo, or with the interpreters that have them: openmpi=/path/python,gloo=/path/python",
    )
    output.add_options(parser, csv=True)
    # nccl-tests' ways to say how many; to guess which is meant would be worse than to ask.
    parser.add_argument("-g", "--ngpus", help=argparse.SUPPRESS)
    parser.add_argument("-t", "--nthreads", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    try:
        output.check(args, "pycomm bench")
    except ValueError as error:
        return fail(str(error))
    from rich.progress import Progress

    from pycomm.bench import measure as m
    from pycomm.bench import report
    from pycomm.bench.sets import Peer, RankSet, SetError, parse_peers
    from pycomm.bench.workers.data import OPS

    try:
        for option, value in (("-g", args.ngpus), ("-t", args.nthreads)):
            if value is not None:
                raise ValueError(f"{option} {value}: say how many ranks there are with --ranks")
        collectives = list(m.COLLECTIVES) if args.collective == ["all"] else args.collective
        for name in collectives:
            if name not in m.COLLECTIVES:
                raise ValueError(f"there is no collective {name!r}: {', '.join(m.COLLECTIVES)}, or all")
        if args.op not in OPS:
            raise ValueError(f"-o {args.op}: the operators are {', '.join(OPS)}")
        at_least(1, "--ranks", args.ranks)
        at_least(1, "-n", args.iters)
        at_least(0, "-w", args.warmup_iters)
        dtype = checked_dtype(args.datatype, args.op, collectives)
        algorithms = {name: chosen_algorithms(name, args.algorithms) for name in collectives}
        for wanted in set(args.algorithms.split(",")) - {"", "all"}:
            if not any(wanted in chosen for chosen in algorithms.values()):
                known = dict.fromkeys(known for name in collectives for known in _native.algorithms(name))
                raise ValueError(f"--algorithms {wanted}: there are {', '.join(known)}")
        if "all_reduce" not in collectives and args.persistent:
            raise ValueError("--persistent: all_reduce alone has a persistent form")
        sizes = size_range(args.minbytes, args.maxbytes, args.stepfactor)
        buffers = args.buffers.split(",")
        if not set(buffers) <= {"plain", "symmetric"}:
            raise ValueError(f"--buffers {args.buffers}: plain, symmetric, or both")
        codecs = [None if name == "none" else name for name in args.codecs.split(",")]
        check_codecs(codecs, collectives, dtype, args.op)
        peers = parse_peers(args.vs)
        if args.plot and collectives == ["barrier"]:
            raise ValueError("--plot: there is nothing to draw: a barrier has no size")
    except ValueError as error:
        return fail(str(error))

    console, errors = output.consoles(args, 240)
    warned: set[str] = set()

    def warn(text: str) -> None:
        if text not in warned:
            warned.add(text)
            errors.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    rows: list[m.Row] = []
    versions: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        try:
            ours = stack.enter_context(RankSet.of_pycomm(args.ranks))
        except SetError as error:
            return fail(f"pycomm's own ranks: {error}")
        versions["pycomm"] = ours.version
        theirs: dict[Peer, RankSet] = {}
        for peer in peers:
            try:
                theirs[peer] = stack.enter_context(RankSet.of_peer(peer, args.ranks))
                versions[peer.name] = theirs[peer].version
            except SetError as error:
                warn(f"{peer.name} is left out: {error}")
        console.print(f"{report.machine()}\n{report.engines(args.ranks, versions)}", highlight=False)
        # Drawn between cases alone: a thread that draws would take time from the ranks.
        progress = stack.enter_context(Progress(console=errors, transient=True, auto_refresh=False))
        for name in collectives:
            if not algorithms[name]:
                warn(f"{name} is left out: it has no algorithm {args.algorithms}")
                continue
            options = m.Options(
                args.ranks,
                sizes,
                dtype,
                args.op,
                args.iters,
                args.warmup_iters,
                bool(args.check),
                algorithms[name],
                buffers if name != "send_recv" else ["plain"],
                args.persistent,
                codecs,
            )
            shown = report.table(name, bool(theirs))
            task = progress.add_task(name, total=sum(1 for _ in m.cases(name, options)))
            try:
                for found in m.measure(name, options, ours, theirs, warn):
                    rows += found
                    report.add_rows(shown, found)
                    progress.update(task, advance=1, refresh=True)
            except SetError as error:
                return fail(f"{name}: pycomm's own ranks: {error}")
            progress.remove_task(task)
            console.print(shown)
    report.print_summary(console, rows)
    output.write_json(args, report.as_json(rows, versions))
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            report.write_csv(rows, file)
    if args.plot and rows:
        from pycomm.bench.plot import plot

        plot(rows, args.plot, report.machine())
    wrong = sum(times.wrong for row in rows for times in row.forms.values())
    if wrong:
        return fail(f"{wrong} elements are wrong")
    return 0 if rows else 1


def checked_dtype(name: str, op: str, collectives: list[str]) -> str:
    """What NumPy calls the type; it and the operator are such that all the collectives have them."""
    from pycomm.bench.workers.data import REDUCING, numpy_dtype

    try:
        dtype: str = numpy_dtype(dtype_name(name)).name
        reducing = any(name in REDUCING for name in collectives)
        call = ("all_reduce", op) if reducing else ("all_gather", "sum")
        pycomm.run_local(lambda comm: comm.explain(call[0], 1, dtype, op=call[1]), 1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"-d {name}{f' -o {op}' if op != 'sum' else ''}: {error}") from None
    return dtype


def check_codecs(codecs: list[str | None], collectives: list[str], dtype: str, op: str) -> None:
    for codec in filter(None, codecs):
        for collective in collectives:
            try:
                if collective not in ("all_reduce", "reduce_scatter", "all_gather"):
                    raise ValueError(f"{collective} takes no codec")
                if codec in ("sign", "topk"):
                    raise ValueError("a call on its own is far off: see pycomm bench codecs")
                x = np.zeros(1, numpy_dtype(dtype))
                pycomm.run_local(lambda comm: codecs_call(comm, collective, x, codec=codec, op=op), 1)  # noqa: B023
            except (TypeError, ValueError) as error:
                raise ValueError(f"--codecs {codec}: {error}") from None


def chosen_algorithms(collective: str, wanted: str) -> list[str | None]:
    """Those of the wanted that it has; None is the library's choice."""
    if not wanted:
        return [None]
    known = _native.algorithms(collective)
    return [*known] if wanted == "all" else [name for name in wanted.split(",") if name in known]


def size_range(low: str, high: str, factor: int) -> list[int]:
    first, last = parse_size(low), parse_size(high)
    if not 0 < first <= last:
        raise ValueError(f"-b {low} -e {high}: sizes go from a positive one up")
    if factor < 2:
        raise ValueError(f"-f {factor}: sizes grow by a factor of 2 or more")
    sizes = []
    while first <= last:
        sizes.append(first)
        first *= factor
    return sizes
