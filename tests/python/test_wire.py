"""Codecs on message links alone, codec="int8@wire": what crosses nodes is encoded, all else is exact."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pycomm
from pycomm import Communicator, codecs
from pycomm.codecs.kinds import DEFAULTS

Floats = npt.NDArray[np.float32]

WORLDS: dict[str, list[int]] = {
    "2 x 2": [0, 0, 1, 1],
    "dealt": [0, 1, 0, 1],
    "3 x 1": [0, 1, 2],
    "3 and 1": [0, 0, 1, 0],
    "2, 1 and 2": [0, 0, 1, 2, 2],
}
worlds = pytest.mark.parametrize("nodes", WORLDS.values(), ids=WORLDS)
CARRIERS = {
    "all_reduce": ["two_shot", "hierarchical"],
    "reduce_scatter": ["direct", "ring", "recursive_halving", "hierarchical"],
    "all_gather": ["direct", "hierarchical"],
}
# vNMSE of one encode, stochastic rounding, with room: docs/codecs.md.
ONE_ENCODE = {"bf16": 5.5e-6 * 1.5, "int8": 8.4e-5 * 1.5, "int4": 1.9e-2 * 1.5}
COUNTS = [1, 1030, 70_001]


def values(rank: int, count: int) -> Floats:
    return np.random.default_rng(rank).normal(size=count).astype("f")


def loss(found: Floats, exact: npt.NDArray[np.float64]) -> float:
    return float(np.sum((found - exact) ** 2) / np.sum(exact**2))


@worlds
@pytest.mark.parametrize("delays", [None, 1])
def test_results_beside_float64(nodes: list[int], delays: int | None) -> None:
    n = len(nodes)

    def fn(comm: Communicator) -> list[bytes]:
        same: list[bytes] = []  # on all ranks
        for count in COUNTS:
            every = [values(r, count) for r in range(n)]
            total = np.sum(every, axis=0, dtype=np.float64)
            x = every[comm.rank]
            for name, most in ONE_ENCODE.items():
                codec = f"{name}@wire"
                for algorithm in CARRIERS["all_reduce"]:
                    found = comm.all_reduce(x.copy(), codec=codec, algorithm=algorithm, step=count)
                    # What each node gives is encoded, and the sum; one element may lose more than many.
                    assert count == 1 or loss(found, total) < 2 * most, (codec, algorithm, count)
                    same.append(found.tobytes())
                mean = comm.all_reduce(x.copy(), op="avg", codec=codec, step=count)
                assert count == 1 or loss(mean, total / n) < 2 * most
                same.append(mean.tobytes())
                for algorithm in CARRIERS["reduce_scatter"]:
                    blocks = np.tile(x, n)
                    found = comm.reduce_scatter(blocks, codec=codec, algorithm=algorithm, step=count)
                    hops = n if algorithm in ("ring", "recursive_halving") else 1
                    assert count == 1 or loss(found, total) < hops * most, (codec, algorithm, count)
                for algorithm in CARRIERS["all_gather"]:
                    found = comm.all_gather(x, codec=codec, algorithm=algorithm, step=count)
                    for r in range(n):
                        part = found.reshape(n, -1)[r]
                        assert count == 1 or loss(part, every[r].astype("d")) < most, (codec, algorithm)
                    same.append(found.tobytes())
        return same

    found = pycomm.run_local(fn, n, nodes=nodes, delays=delays, timeout=60)
    assert all(each == found[0] for each in found)


@worlds
def test_delays_change_no_bits(nodes: list[int]) -> None:
    def fn(comm: Communicator) -> list[bytes]:
        x = values(comm.rank, 40_000)
        return [
            comm.all_reduce(x.copy(), codec="int8@wire", step=1).tobytes(),
            comm.reduce_scatter(np.tile(x, comm.size), codec="int8@wire", step=2).tobytes(),
            comm.all_gather(x, codec="int8@wire", step=3).tobytes(),
        ]

    runs = [pycomm.run_local(fn, len(nodes), nodes=nodes, delays=delays) for delays in (None, 1, 2)]
    assert runs[0] == runs[1] == runs[2]


def on_each_call(comm: Communicator, codec: Any) -> list[bytes]:
    """One result of each way to call, in order."""
    x = values(comm.rank, 5000)
    given: dict[str, Any] = {} if codec is None else {"codec": codec, "step": 1}
    found = [
        comm.all_reduce(x.copy(), **given),
        comm.all_reduce(x.copy(), op="avg", **given),
        comm.all_reduce(x[:3].copy(), **given),
        comm.reduce_scatter(np.tile(x, comm.size), **given),
        comm.all_gather(x, **given),
        comm.all_reduce(x.copy(), async_op=True, **given).result(),
        *comm.all_reduce([x.copy(), x[:7].copy()], **given),
    ]
    found.append(comm.all_reduce(x.astype("float16"), **given))
    kept = x.copy()
    bound = comm.all_reduce_init(kept, **({} if codec is None else {"codec": codec}))
    bound()
    bucket = pycomm.Bucket([x[:1000].copy(), x[:77].copy()])
    bucket.pack()
    comm.all_reduce(bucket, **given)
    bucket.unpack()
    return [each.tobytes() for each in (*found, kept, *bucket.views)]


def test_on_one_node_nothing_is_lost() -> None:
    for codec in (name for name, kind in DEFAULTS.items() if isinstance(kind, codecs.BlockCodec)):
        if codec == "sign":
            continue
        encoded = pycomm.run_local(lambda comm, c=codec: on_each_call(comm, f"{c}@wire"), 4)
        assert encoded == pycomm.run_local(lambda comm: on_each_call(comm, None), 4), codec


@pytest.mark.parametrize("algorithm", ["direct", "hierarchical"])
def test_ranks_of_a_node_add_exactly(algorithm: str) -> None:
    """The ranks elsewhere give zeros, which codecs keep: then sums have the bits of no codec."""

    def fn(comm: Communicator) -> None:
        x = values(comm.rank, 3000) if comm.rank != 2 else np.zeros(3000, np.float32)
        blocks = np.tile(x, 4)
        exact = comm.reduce_scatter(blocks, algorithm=algorithm)
        found = comm.reduce_scatter(blocks, algorithm=algorithm, codec="int4@wire")
        assert np.array_equal(exact, found) == (comm.rank != 2)

    pycomm.run_local(fn, 4, nodes=[0, 0, 1, 0])


def test_hierarchical_is_chosen_and_explained() -> None:
    def sent(text: str) -> int:
        ranges = re.findall(r"send to rank .*window\[(\d+):(\d+)\]", text)
        return sum(int(end) - int(begin) for begin, end in ranges)

    def fn(comm: Communicator) -> None:
        for collective in CARRIERS:
            text = comm.explain(collective, 16384, "float32", codec="int8@wire")
            assert "codec=int8@wire" in text and "hierarchical: what crosses between nodes is encoded" in text
            assert "wire" in text
            exact = comm.explain(collective, 16384, "float32", algorithm="hierarchical")
            assert sent(text) * 4 == sent(exact) * 1040 / 1024  # all of whole tiles
            once = comm.explain(collective, 16384, "float32", codec="int8@wire", deterministic=True)
            assert "hierarchical" not in once.split("plan")[0] or collective == "all_gather"
        assert "codec=int8" in comm.explain("all_reduce", 100, codec="int8")
        with pytest.raises(
            ValueError, match="broadcast cannot carry int8, all_reduce, reduce_scatter and all_gather can"
        ):
            comm.explain("broadcast", 100, codec="int8")
        with pytest.raises(ValueError, match="topk, whose calls run several plans"):
            comm.explain("all_reduce", 100, codec="topk")

    pycomm.run_local(fn, 4, nodes=2)


def test_the_object_says_the_same() -> None:
    assert codecs.Int8(links="wire") != codecs.Int8()

    def fn(comm: Communicator) -> None:
        x = values(comm.rank, 5000)
        named = comm.all_reduce(x.copy(), codec="int8@wire", step=5)
        same = comm.all_reduce(x.copy(), codec=codecs.Int8(links="wire"), step=5)
        other = comm.all_reduce(x.copy(), codec="int8", step=5)
        assert np.array_equal(named, same) and not np.array_equal(named, other)

    pycomm.run_local(fn, 4, nodes=2)


def refused(call: Callable[[Communicator], Any], match: str, nodes: int | None = 2) -> None:
    def fn(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=match):
            call(comm)

    pycomm.run_local(fn, 4, nodes=nodes) if nodes else pycomm.run_local(fn, 4)


@pytest.mark.parametrize("algorithm", ["one_shot", "ring", "tree", "halving_doubling"])
def test_other_algorithms_are_refused(algorithm: str) -> None:
    x = np.ones(100, np.float32)
    match = f'"{algorithm}" carries no codec between nodes only .@wire.; those that do are two_shot, hier'
    refused(lambda comm: comm.all_reduce(x, codec="int8@wire", algorithm=algorithm), match)


def test_names_that_are_none() -> None:
    x = np.ones(100, np.float32)
    no_feedback = r"pass pycomm.codecs.Sign.links=\"wire\", error_feedback=False."
    for codec, match in {
        "sign@wire": no_feedback,  # and not first the names that error feedback needs
        "sign@wier": no_feedback,
        "int8@node": "'int8@node': int8@wire encodes what crosses between nodes",
        "int8@": "int8@wire encodes",
        "int9@wire": "did you mean 'int8@wire'",
        "INT8@wier": "did you mean 'int8@wire'",
        "int8wire": "did you mean 'int8@wire'",
        "Int8": "did you mean 'int8'",
        "topk@wire": "topk cannot be used with @wire; fp16, .*int4 can",
        "topk@wier": "topk cannot be used with @wire",
        "shared_int@wire": "shared_int cannot be used with @wire",
    }.items():
        refused(lambda comm, c=codec: comm.all_reduce(x, codec=c), match, nodes=None)
    with pytest.raises(ValueError, match="links='node': 'all', or 'wire'"):
        codecs.Int8(links="node")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="links"):
        codecs.TopK(links="wire")  # type: ignore[call-arg]


@pytest.mark.parametrize("nodes", [2, None])
def test_error_feedback_is_refused(nodes: int | None) -> None:
    x = np.ones(100, np.float32)
    match = "sign@wire and error feedback: .* pass pycomm.codecs.Sign.*error_feedback=False"
    refused(lambda comm: comm.all_reduce(x, codec="sign@wire", tag="x"), match, nodes)
    for feedback in (True, codecs.ErrorFeedback()):
        with pytest.raises(ValueError, match="int8@wire and error feedback"):
            codecs.Int8(links="wire", error_feedback=feedback)
    pycomm.run_local(
        lambda comm: comm.all_reduce(x.copy(), codec=codecs.Sign(links="wire", error_feedback=False)),
        4,
        nodes=2,
    )


@pytest.mark.parametrize("nodes", [2, None])
def test_ranks_that_differ_in_links_are_told(nodes: int | None) -> None:
    def fn(comm: Communicator) -> None:
        with pytest.raises(
            pycomm.MismatchError, match=r"codec=int8@wire.*codec=int8\b(?!@)|codec=int8\b(?!@).*int8@wire"
        ):
            comm.all_reduce(np.ones(4000, np.float32), codec="int8" if comm.rank == 1 else "int8@wire")
            comm.barrier()

    pycomm.run_local(fn, 4, nodes=nodes) if nodes else pycomm.run_local(fn, 4)
