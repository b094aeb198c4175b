"""Measures tables one after the other, prints rows as they are measured, and keeps them however the run
ends."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pycomm.bench import machine, measure, record, report
from pycomm.bench.peers import Peer, SetError
from pycomm.bench.rows import NotRun, Options, Row, summarize
from pycomm.bench.sets import Cpus, RankSet
from pycomm.cli import output
from pycomm.cli.main import fail


class Session:
    """Consoles, progress, warnings; and how the run ended: complete, interrupted, or failed and why."""

    def __init__(self, args: argparse.Namespace, total: int) -> None:
        self.args = args
        self.console, errors = output.consoles(args, report.WIDTH)
        self._messages = self.console if self.console.is_terminal and errors.is_terminal else errors
        # Drawn only between cases: a drawing thread would take time from the ranks.
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._messages,
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("", total=total)
        self._warned: set[str] = set()
        self._unwritten: list[str] = []
        self.not_run: list[NotRun] = []  # at each size
        self.versions: dict[str, str] = {}
        self.ended = "complete"
        settings = {name: value for name, value in vars(args).items() if name not in ("run", "command")}
        self.record = record.Record(settings)

    def warn(self, of: str | NotRun) -> None:
        if isinstance(of, NotRun):
            self.not_run.append(of)
        text = str(of)
        if text not in self._warned:
            self._warned.add(text)
            self._messages.print(text, style="yellow", highlight=False, soft_wrap=True)

    def say(self, *lines: str) -> None:
        for line in lines:
            self.console.print(line, highlight=False, soft_wrap=True)

    def advance(self, what: str, by: int = 1) -> None:
        self._progress.update(self._task, description=what, advance=by, refresh=True)
        if output.lost(self.console):
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM, SIGHUP, a reader that has gone and any failure only end the measuring: the rows
        found so far are still written."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:  # ignored under nohup
                signal.signal(number, signal.default_int_handler)
        try:
            with self._progress:
                self.say(machine.describe())
                yield
        except KeyboardInterrupt:
            self.ended = "interrupted"
        except SetError as error:
            self.ended = f"failed: pycomm's own ranks: {error}"
        except Exception as error:
            self.warn(traceback.format_exc())
            self.ended = f"failed: {type(error).__name__}: {error}"
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def sets(
        self, size: int, peers: Sequence[Peer], cpus: Cpus | None = None
    ) -> Iterator[tuple[RankSet, dict[Peer, RankSet]]]:
        """The ranks of pycomm, and of those peers that start."""
        with contextlib.ExitStack() as stack:
            ours = stack.enter_context(RankSet.of_pycomm(size, cpus=cpus))
            self.versions["pycomm"] = ours.version
            theirs: dict[Peer, RankSet] = {}
            for peer in peers:
                try:
                    theirs[peer] = stack.enter_context(RankSet.of_peer(peer, size, cpus))
                    self.versions[peer.name] = theirs[peer].version
                except SetError as error:
                    self.warn(NotRun(peer.name, f"{peer.name} is left out: {error}"))
            yield ours, theirs

    def as_json(self, rows: Sequence[Mapping[str, Any]], **more: Any) -> str:
        not_run = {of.what: of.why for of in self.not_run}
        return self.record.as_json(self.versions, rows, self.ended, not_run=not_run, **more)

    def write(self, outputs: Mapping[str, Callable[[str], None]]) -> None:
        self._unwritten += output.write(self.args, outputs)

    def failure(self, wrong: int, found: bool) -> str:
        """Why the run failed, or "". A call that an engine does not have is no failure."""
        if self.ended.startswith("failed"):
            return self.ended
        failed = dict.fromkeys(of.what for of in self.not_run if of.failure)
        reasons = [f"{wrong} elements are wrong"] * bool(wrong)
        reasons += [f"not run: {report.listed(list(failed))}"] * bool(failed)
        return "; ".join(reasons) or "nothing was measured" * (not found)

    def close(self, wrong: int, found: bool) -> None:
        """Prints the last line."""
        if found or self.not_run:
            failed = bool(self.failure(wrong, found))
            not_run = list(dict.fromkeys(of.what for of in self.not_run))
            self.say(report.closing(wrong, bool(self.args.check), not_run, failed))

    def code(self, wrong: int, found: bool) -> int:
        unwritten = output.not_written([*self._unwritten, *output.lost(self.console)])
        if self.ended == "interrupted":
            self.warn("interrupted: the outputs hold the results up to then")
            return 130
        failure = self.failure(wrong, found)
        return fail(failure) if failure else unwritten


def columns(text: str | None) -> list[str]:
    """--columns time,min,p99"""
    found = [] if text is None else text.split(",")
    for name in found:
        if name not in report.COLUMNS:
            raise ValueError(
                f"--columns {text}: there is no column {name!r}, only {', '.join(report.COLUMNS)}"
            )
    return found


def run(
    args: argparse.Namespace,
    tables: Sequence[tuple[str, Options]],
    peers: Sequence[Peer],
    columns: Sequence[str],
) -> int:
    session = Session(args, sum(1 for name, options in tables for _ in measure.cases(name, options)))
    mpis = [peer.name for peer in peers if peer.is_mpi]
    rows: list[Row] = []
    with session.measuring():
        for world, of_world in itertools.groupby(tables, lambda table: table[1].ranks):
            with session.sets(world, peers) as (ours, theirs):
                names = ["pycomm", *(peer.name for peer in theirs)]
                versions = {name: session.versions[name] for name in names}
                session.say(report.engines(world, versions))
                for name, options in of_world:
                    _measure(session, name, options, ours, theirs, columns, rows)
    finish(session, rows, mpis)
    return session.code(sum(row.wrong for row in rows), bool(rows))


def _measure(
    session: Session,
    name: str,
    options: Options,
    ours: RankSet,
    theirs: dict[Peer, RankSet],
    columns: Sequence[str],
    rows: list[Row],
) -> None:
    lacks = "" if options.buffers else "symmetric buffers"
    if not options.algorithms:
        lacks = f"algorithm {session.args.algorithms}"
    if lacks:
        session.warn(NotRun(f"{name}, {lacks}", f"{name} is left out: it has no {lacks}"))
        session.advance(name, sum(1 for _ in measure.cases(name, options)))
        return
    largest = max((size, case.count) for size, case in measure.cases(name, options))
    table = report.Table(
        name, options, [peer.name for peer in theirs], columns, largest, session.console.width
    )
    session.say("", *table.heading())
    begin = len(rows)
    for found in measure.measure(name, options, ours, theirs, session.warn):
        rows += found
        session.say(*table.lines(found))
        session.advance(f"{name}, {options.dtype}, {options.ranks} ranks")
    if averages := report.averages(rows[begin:]):
        session.say("", *averages)


def finish(session: Session, rows: Sequence[Row], mpis: Sequence[str]) -> None:
    """Writes the requested outputs and prints the summary."""

    def draw(path: str) -> None:
        if any(row.bytes for row in rows):
            from pycomm.bench.plot import plot

            plot(rows, path, machine.describe())

    text = session.as_json([row.as_dict() for row in rows], summary=summarize(rows, mpis))
    session.write(
        {
            "json": lambda path: output.write_text(path, text),
            "csv": lambda path: output.write_text(path, record.as_csv(rows)),
            "markdown": lambda path: output.write_text(path, report.markdown(rows, mpis)),
            "plot": draw,
        }
    )
    session.say("")
    report.print_summary(session.console, rows, mpis)
    session.close(sum(row.wrong for row in rows), bool(rows))
