"""pycomm, in its forms: in place, with `out=`, on symmetric memory, on shared arrays, persistent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from data import POINT_TO_POINT, WINDOW
from load import is_own, load

import pycomm

if TYPE_CHECKING:
    from pycomm.bench.workers.data import Array, Case

OUT_OF_PLACE = {
    "all_reduce": "comm.all_reduce(x, out=out{more})",
    "reduce_scatter": "comm.reduce_scatter(x, out=out{more})",
    "all_gather": "comm.all_gather(x, out=out{more})",
    "broadcast": "comm.broadcast(x, out=out{more})",
    "reduce": "comm.reduce(x, out=out{more})",
    "gather": "comm.gather(x, out={out_at_root}{more})",
    "scatter": "comm.scatter({x_at_root}, out=out{more})",
    "all_to_all": "comm.all_to_all(x, out=out{more})",
    "barrier": "comm.barrier({more})",
    "send_recv": "comm.send_recv(x, right, out, left)",
}
IN_PLACE = {
    **OUT_OF_PLACE,
    "all_reduce": "comm.all_reduce(x{more})",
    "broadcast": "comm.broadcast(x{more})",
    "reduce": "comm.reduce(x{more})",
    "all_to_all": "comm.all_to_all(x, out=x{more})",
}
TWO_RANKS = {
    "ping_pong": ("comm.send(x, 1); comm.recv(out, 1)", "comm.recv(out, 0); comm.send(x, 0)"),
    "one_way": (
        "for work in [comm.send(x, 1, async_op=True) for _ in window]: work.wait()",
        "for work in [comm.recv(out, 0, async_op=True) for _ in window]: work.wait()",
    ),
    "two_way": tuple(
        f"for work in [comm.recv(out, {peer}, async_op=True) for _ in window]"
        f" + [comm.send(x, {peer}, async_op=True) for _ in window]: work.wait()"
        for peer in (1, 0)
    ),
}


class Engine:
    def __init__(self, rank: int, size: int, directory: str) -> None:
        self.comm = pycomm.init()
        self.rank = self.comm.rank
        self.version = f"pycomm {pycomm.__version__}"
        self.origin = pycomm.__file__
        self.own: dict[str, Any] = {}  # the user's own objects, by "module:name"

    def barrier(self) -> None:
        self.comm.barrier()

    def empty(self, count: int, dtype: np.dtype[Any]) -> Array:
        return np.empty(count, dtype)

    def in_place_part(self, case: Case) -> int:
        return self.rank

    def symmetric(self, count: int, dtype: np.dtype[Any]) -> Array:
        made: Array = self.comm.empty((count,), dtype)
        return made

    def shared(self, count: int, dtype: np.dtype[Any]) -> Array:
        with pycomm.shared_arrays():
            return np.empty(count, dtype)

    def bind(
        self, case: Case, form: str, variant: dict[str, Any], x: Array, out: Array
    ) -> tuple[str, dict[str, Any]] | None:
        comm, size = self.comm, self.comm.size
        names = {"comm": comm, "x": x, "out": out}
        if case.collective == "send_recv":
            if form == "in_place" or size == 1:
                return None
            names |= {"right": (self.rank + 1) % size, "left": (self.rank - 1) % size}
        if case.collective in POINT_TO_POINT:
            text = TWO_RANKS[case.collective][self.rank]
            return None if form == "in_place" else (text, {**names, "window": range(WINDOW)})
        if case.collective == "barrier" and form == "in_place":
            return None
        root = self.rank == case.root
        more = _more(case)
        for option in ("algorithm", "codec"):
            if variant[option]:
                names[option] = self._found(variant[option])
                more += f", {option}={option}"
        call = (IN_PLACE if form == "in_place" else OUT_OF_PLACE)[case.collective].format(
            x_at_root="x" if root else None, out_at_root="out" if root else None, more=more
        )
        call = call.replace("(, ", "(")
        if variant["persistent"]:
            return "op()", {"op": eval(call.replace("all_reduce", "all_reduce_init"), names)}
        return call, names

    def _found(self, name: str) -> Any:
        """The name, or the object that it names, made once: a codec must keep its state."""
        if not is_own(name):
            return name
        if name not in self.own:
            self.own[name] = load(name)
        return self.own[name]

    def start(self, text: str) -> str:
        return f"{text[:-1]}, async_op=True)"

    def algorithm(self, case: Case, variant: dict[str, Any]) -> str:
        if variant["algorithm"]:
            return str(self._found(variant["algorithm"]))
        if case.collective in ("send_recv", *POINT_TO_POINT):
            return "direct"
        if variant["codec"]:
            return "two_shot" if case.collective == "all_reduce" else "direct"
        text = self.comm.explain(
            case.collective,
            case.count,
            case.dtype,
            op=case.op,
            root=case.root,
        )
        lines = [line.split() for line in text.splitlines()]
        return next(words[1].rstrip(":") for words in lines if words[:1] == ["algorithm"])

    def close(self) -> None:
        self.comm.close()


def _more(case: Case) -> str:
    """The arguments that differ from the defaults."""
    more = "" if case.op == "sum" else f", op={case.op!r}"
    return more + (f", root={case.root}" if case.root else "")
