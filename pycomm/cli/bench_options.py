"""The options that the commands of `pycomm bench` share. Every mistake is a ValueError that names the option
and its value, before any rank is started."""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
from collections.abc import Sequence

import numpy as np

import pycomm
from pycomm import _native
from pycomm.bench.workers.data import OPS, REDUCING, numpy_dtype
from pycomm.bench.workers.load import is_own, load
from pycomm.cli.main import warn
from pycomm.cli.values import at_least, check_ranks, dtype_name, parse_size
from pycomm.codecs import Codec

MOST_SIZES = 1000


def add_sizes(parser: argparse.ArgumentParser, first: str, last: str) -> None:
    parser.add_argument(
        "-b", "--minbytes", default=first, metavar="SIZE", help=f"smallest size: 4, 1K, 64M, 1G ({first})"
    )
    parser.add_argument("-e", "--maxbytes", default=last, metavar="SIZE", help=f"largest size ({last})")
    parser.add_argument("-f", "--stepfactor", type=int, metavar="N", help="factor between sizes (4)")
    parser.add_argument("-i", "--stepbytes", metavar="SIZE", help="bytes between sizes, instead of -f")


def add_calls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-n",
        "--iters",
        type=int,
        metavar="N",
        help="calls in a sample (as many as take 0.4 ms, at least one)",
    )
    parser.add_argument(
        "-w", "--warmup_iters", type=int, metavar="N", help="calls before each repetition (a tenth)"
    )


def add_peers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vs",
        default="",
        metavar="PEERS",
        help="mpi,gloo, or with the interpreters to run them in: openmpi=/path/python,mpich=..,impi=..,"
        "gloo=..,torch=..,deepspeed=..; another build of pycomm by its interpreter or folder: pycomm=PATH",
    )


def add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--huge", action="store_true", help="put the large buffers of every engine into huge pages"
    )
    parser.add_argument(
        "--offset",
        metavar="N[,M]",
        help="the first byte of all buffers lies N bytes beyond a page (of outputs: M); else where the"
        " engine's usual allocator puts it",
    )
    parser.add_argument(
        "--cold", action="store_true", help="flush the caches before each call, and time it alone"
    )


def check_calls(args: argparse.Namespace) -> None:
    at_least(1, "-n", args.iters)
    at_least(0, "-w", args.warmup_iters)
    for option, value in (("-n", args.iters), ("-w", args.warmup_iters)):
        if getattr(args, "cold", False) and value is not None:
            raise ValueError(f"--cold and {option} {value}: cold calls are timed one by one, without warmup")


def sizes(args: argparse.Namespace) -> list[int]:
    if args.stepbytes is not None:
        if args.stepfactor is not None:
            raise ValueError(
                f"-i {args.stepbytes} -f {args.stepfactor}: sizes grow by one of the two, not both"
            )
        return size_range(args.minbytes, args.maxbytes, step=args.stepbytes)
    return size_range(args.minbytes, args.maxbytes, 4 if args.stepfactor is None else args.stepfactor)


def size_range(low: str, high: str, factor: int = 2, step: str | None = None) -> list[int]:
    first, last = parse_size(low, "-b"), parse_size(high, "-e")
    if not 0 < first <= last:
        raise ValueError(f"-b {low} -e {high}: the first size must be positive, and not above the last")
    if factor < 2:
        raise ValueError(f"-f {factor}: the factor must be at least 2")
    if step is not None:
        by = parse_size(step, "-i")
        if by < 1:
            raise ValueError(f"-i {step}: the step must be at least a byte")
        if (last - first) // by >= MOST_SIZES:
            raise ValueError(f"-b {low} -e {high} -i {step}: more than {MOST_SIZES} sizes; take larger steps")
        return list(range(first, last + 1, by))
    found = []
    while first <= last:
        found.append(first)
        first *= factor
    return found


def world_sizes(text: str) -> list[int]:
    """--ranks 2,4"""
    found = []
    for part in text.split(","):
        if not re.fullmatch(r"-?\d{1,20}", part):
            raise ValueError(f"--ranks {text}: {part!r} is not a number of ranks")
        check_ranks("--ranks", int(part))
        found.append(int(part))
    return list(dict.fromkeys(found))


def dtypes(text: str, op: str, collectives: Sequence[str]) -> list[str]:
    """The types of -d float,half; `all` means those that the collectives support with this operator."""
    if text != "all":
        return list(dict.fromkeys(checked_dtype(name, op, collectives) for name in text.split(",")))
    found: list[str] = []
    missing: list[str] = []
    for name in _native.DTYPES:
        with contextlib.suppress(TypeError, ValueError):
            _check_dtype(name, op, collectives)
            (found if _numpy_has(name) else missing).append(name)
    if missing:
        warn(f"-d all leaves out {', '.join(missing)}, which NumPy lacks: pip install ml_dtypes")
    return found


def checked_dtype(name: str, op: str, collectives: Sequence[str]) -> str:
    """NumPy's name of the type. Raises ValueError if a collective does not support it with this operator."""
    try:
        dtype: str = numpy_dtype(dtype_name(name)).name
        _check_dtype(dtype, op, collectives)
    except (TypeError, ValueError) as error:
        raise ValueError(f"-d {name}{f' -o {op}' if op != 'sum' else ''}: {error}") from None
    return dtype


def _check_dtype(dtype: str, op: str, collectives: Sequence[str]) -> None:
    """Raises TypeError or ValueError if the library has no such calls."""
    reducing = any(name in REDUCING for name in collectives)
    call = ("all_reduce", op) if reducing else ("all_gather", "sum")
    pycomm.run_local(lambda comm: comm.explain(call[0], 1, dtype, op=call[1]), 1)


def _numpy_has(dtype: str) -> bool:
    try:
        numpy_dtype(dtype)
    except ValueError:
        return False
    return True


def check_op(op: str) -> None:
    if op not in OPS:
        raise ValueError(f"-o {op}: the operators are {', '.join(OPS)}")


def algorithms(wanted: str, collectives: Sequence[str]) -> dict[str, list[str | None]]:
    """The wanted algorithms that each collective has; None is the library's choice."""
    found = {name: chosen_algorithms(name, wanted) for name in collectives}
    for name in set(wanted.split(",")) - {"", "all"}:
        if not any(name in chosen for chosen in found.values()):
            if is_own(name):
                raise ValueError(f"--algorithms {name}: is an algorithm for {own_algorithm(name).collective}")
            known = dict.fromkeys(known for name in collectives for known in _native.algorithms(name))
            raise ValueError(f"--algorithms {name}: unknown, use one of {', '.join(known)}")
    return found


def chosen_algorithms(collective: str, wanted: str) -> list[str | None]:
    if not wanted:
        return [None]
    known = _native.algorithms(collective)
    found: list[str | None] = []
    for name in wanted.split(","):
        if name == "all":
            found += known
        elif name in known or (is_own(name) and own_algorithm(name).collective == collective):
            found.append(name)
    return list(dict.fromkeys(found))


@functools.cache
def own_algorithm(text: str) -> pycomm.Algorithm:
    """Loads a user's algorithm. An exception of its `write` becomes a ValueError."""
    found = load(text)
    if not isinstance(found, pycomm.Algorithm):
        raise ValueError(
            f"{text} is a {type(found).__name__}, not a pycomm.Algorithm: see docs/algorithms.md"
        )
    write = found.write

    def named(builder: pycomm.algorithm.Builder, world: pycomm.algorithm.World) -> None:
        try:
            write(builder, world)
        except ValueError:  # from the builder: it already says what is wrong
            raise
        except (Exception, SystemExit) as error:
            raise ValueError(f"{text}: write() raises {type(error).__name__}: {error}") from error

    found.write = named
    return found


def own_codec(text: str) -> str | Codec:
    """Loads a user's codec; a name is returned as it is."""
    found = load(text) if is_own(text) else text
    if not isinstance(found, str | Codec):
        raise ValueError(f"{text} is a {type(found).__name__}, not an object of pycomm.codecs")
    return found


def codecs(text: str, collectives: Sequence[str], dtypes: Sequence[str], op: str) -> list[str | None]:
    """--codecs none,int8,module:name"""
    found = [None if name == "none" else name for name in text.split(",")]
    for codec in filter(None, found):
        for collective in collectives:
            for dtype in dtypes:
                _check_codec(codec, collective, dtype, op)
    return found


def _check_codec(codec: str, collective: str, dtype: str, op: str) -> None:
    try:
        if collective not in ("all_reduce", "reduce_scatter", "all_gather"):
            raise ValueError(f"{collective} takes no codec")
        if codec in ("sign", "topk"):
            raise ValueError("a single call has a large error: see pycomm bench codecs")
        own = own_codec(codec)
        x = np.zeros(1, numpy_dtype(dtype))
        options = {} if collective == "all_gather" else {"op": op}
        pycomm.run_local(lambda comm: getattr(comm, collective)(x, codec=own, **options), 1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--codecs {codec}: {error}") from None
    except Exception as error:  # from a user's codec
        raise ValueError(f"--codecs {codec}: it raises {type(error).__name__}: {error}") from error


def offsets(text: str | None, dtypes: Sequence[str]) -> tuple[int, int] | None:
    """--offset 16, or, with another offset for outputs, --offset 16,48"""
    if text is None:
        return None
    found = numbers_beyond_a_page("--offset", text, dtypes)
    if len(found) > 2:
        raise ValueError(f"--offset {text}: give one number, or two: for inputs and for outputs")
    return found[0], found[-1]


def numbers_beyond_a_page(option: str, text: str, dtypes: Sequence[str]) -> list[int]:
    found = []
    for part in text.split(","):
        if not part.isdecimal() or int(part) >= 4096:
            raise ValueError(f"{option} {text}: {part!r} is not a number of bytes within a page, 0 to 4095")
        found.append(int(part))
    for dtype in dtypes:
        item = numpy_dtype(dtype).itemsize
        for offset in found:
            if offset % item:
                raise ValueError(
                    f"{option} {text}: {dtype} elements lie at multiples of {item}; -d uint8 may lie anywhere"
                )
    return found
