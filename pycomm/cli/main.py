"""`pycomm COMMAND ...`, also `python -m pycomm`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TextIO

import pycomm

COMMANDS = {
    "run": "start the ranks of a job on this machine",
    "bench": "measure the collectives, compared with MPI and Gloo if installed",
    "bench p2p": "measure latency and bandwidth between two ranks, and between all pairs of cores",
    "bench overlap": "measure how much of an asynchronous call runs while a rank computes",
    "bench kernels": "measure the inner loops against the bandwidth of a copy, and against torch",
    "bench codecs": "measure the errors of gradient codecs and the bytes that they send",
    "verify": "prove that the plans of an algorithm are right",
    "explain": "say which plan a call would run, and why",
    "info": "say what this machine and this installation have",
}


def main(argv: Sequence[str] | None = None) -> int:
    _open_standard_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    if " ".join(argv[:2]) in COMMANDS:
        argv[:2] = [" ".join(argv[:2])]
    parser = argparse.ArgumentParser(prog="pycomm", description="Collective communication for training.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
        if argv and argv[0] == name:
            module = importlib.import_module(f"pycomm.cli.{name.replace(' ', '_')}")
            module.configure(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
    except KeyboardInterrupt:
        return 130
    return code


class _Version(argparse.Action):
    """Makes the text only when asked, since the launcher starts without the module that has the version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.exit(show(f"pycomm {pycomm.__version__}"))


def show(text: str) -> int:
    """Prints to standard output. Returns the exit code."""
    try:
        print(text, flush=True)
    except OSError as error:
        silence(sys.stdout)
        return fail(f"not written: standard output: {error.strerror}", 1)
    return 0


def fail(message: str, code: int = 2) -> int:
    """Prints a line to stderr. Returns the exit code: argparse's, for an error of the user."""
    _say(f"error: {message}")
    return code


def warn(message: str) -> None:
    """Prints a line to stderr."""
    _say(f"warning: {message}")


def _say(message: str) -> None:
    try:
        print(f"pycomm: {message}", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Drops everything still written to the stream, so that Python's last flush does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _open_standard_streams() -> None:
    """Opens closed streams to /dev/null: otherwise the next opened file takes their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            while os.open(os.devnull, os.O_RDWR) < number:
                pass
            setattr(sys, name, open(number, "r" if name == "stdin" else "w"))  # noqa: SIM115


if __name__ == "__main__":
    raise SystemExit(main())
