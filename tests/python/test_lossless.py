"""codec="lossless": bfloat16 comes back bit by bit, in fewer bytes, or the call is an error."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pycomm
from pycomm import Communicator, _native, codecs

ml_dtypes = pytest.importorskip("ml_dtypes")

Ranks = Callable[..., list[Any]]
Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.links
BF16 = np.dtype(ml_dtypes.bfloat16)


def of_words(words: Any) -> Array:
    return np.asarray(words, np.uint16).view(BF16)


def gaussian(rank: int, count: int) -> Array:
    return np.random.default_rng(rank).standard_normal(count).astype(BF16)


def noise(rank: int, count: int) -> Array:
    """Every bit is random: not to be made smaller."""
    return of_words(np.random.default_rng(rank).integers(0, 1 << 16, count))


def roundtrip(x: Array) -> int:
    """Returns the bytes that `x` takes encoded, and asserts that it comes back."""
    wire = np.empty(_native.lossless_bound(x.size), np.uint8)
    size = _native.lossless_encode(x, wire)
    out = np.empty_like(x)
    assert _native.lossless_decode(wire[:size].copy(), out) == size
    assert out.tobytes() == x.tobytes()
    return size


# ---- kernels ----


@given(st.binary(max_size=3000), st.integers(1, 40))
@example(b"", 1)
@example(b"\x80\xff", 40)
def test_any_bytes_come_back(data: bytes, times: int) -> None:
    x = np.frombuffer(data[: len(data) // 2 * 2] * times, np.uint16).view(BF16)
    assert roundtrip(x) <= 2 * x.size + 4 * -(-x.size // 65536)


@given(st.integers(0, 255), st.lists(st.integers(0, 255), min_size=1, max_size=40), st.integers(0, 5000))
def test_few_exponents_come_back_in_fewer_bytes(seed: int, exponents: list[int], count: int) -> None:
    random = np.random.default_rng(seed)
    x = of_words(random.choice(exponents, count) << 7 | random.integers(0, 1 << 16, count) & 0x807F)
    size = roundtrip(x)
    # At most 6 bits for each of 40 exponents, if they are as frequent; 128 nibbles and 18 bytes about them.
    assert size <= 4 + max(count * 14 / 8 + 150, 0) or size == _native.lossless_bound(count)


@settings(max_examples=300)
@given(st.data())
def test_damage_is_an_error_or_other_elements(data: st.DataObject) -> None:
    x = gaussian(1, 700)
    wire = np.empty(_native.lossless_bound(x.size), np.uint8)
    wire = wire[: _native.lossless_encode(x, wire)].copy()
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, wire.size - 1))] = data.draw(st.integers(0, 255))
    wire = wire[: data.draw(st.integers(0, wire.size))].copy()
    try:
        assert _native.lossless_decode(wire, np.empty_like(x)) <= wire.size
    except ValueError as error:
        assert "codec lossless" in str(error)


def test_it_is_as_small_as_zlib_makes_the_planes_of_bytes() -> None:
    import zlib

    scales = np.exp(np.random.default_rng(0).normal(size=(300, 1)))  # of the rows of a weight
    of_rows = np.random.default_rng(2).normal(size=(300, 1000)) * scales
    for x in (gaussian(1, 300_000), of_rows.ravel().astype(BF16)):
        words = x.view(np.uint16)
        exponents = (words >> 7).astype(np.uint8)
        rest = (words >> 8 & 0x80 | words & 0x7F).astype(np.uint8)
        by_zlib = sum(len(zlib.compress(plane.tobytes(), 6)) for plane in (exponents, rest))
        assert roundtrip(x) < by_zlib
    assert roundtrip(gaussian(1, 300_000)) < 0.67 * 2 * 300_000


def test_the_kernels_refuse_what_they_cannot_take() -> None:
    x, wire = gaussian(0, 100), np.empty(204, np.uint8)
    with pytest.raises(TypeError, match="`x` is float32: codec lossless is for bfloat16"):
        _native.lossless_encode(x.astype(np.float32), wire)
    with pytest.raises(TypeError, match="`out` is int16: codec lossless is for bfloat16"):
        _native.lossless_decode(wire, np.empty(100, np.int16))
    with pytest.raises(ValueError, match="`wire` has 203 bytes: 100 elements may take 204"):
        _native.lossless_encode(x, wire[:203])
    with pytest.raises(ValueError, match="read-only"):
        _native.lossless_decode(wire, np.frombuffer(bytes(200), np.uint16).view(BF16))


# ---- calls ----


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_length_and_pattern(ranks: Ranks, n: int) -> None:
    def fn(comm: Communicator) -> None:
        lengths = [*range(6), 63, 64, 65, 255, 511, 1023, 1024, 1025, 65_536, 65_537]
        for count in lengths:
            for make in (gaussian, noise):
                x, parts = make(comm.rank, count), [make(r, count) for r in range(n)]
                gathered = comm.all_gather(x, codec="lossless")
                assert gathered.tobytes() == b"".join(part.tobytes() for part in parts)
                root = count % n
                assert comm.broadcast(x, root=root, codec="lossless") is x
                assert x.tobytes() == parts[root].tobytes()
        # All patterns: as they are, and among others, so that they are coded.
        for fill in (0, 7 * 65536):
            words = np.full(65536 + fill, 0x3F80, np.uint16)
            words[:: len(words) // 65536] = np.arange(65536)
            assert comm.all_gather(of_words(words), codec="lossless").tobytes() == n * words.tobytes()

    ranks(fn, n)


@pytest.mark.parametrize("count", range(0, 1026, 41))
def test_odd_lengths(count: int) -> None:
    def fn(comm: Communicator) -> None:
        for length in range(count, min(count + 41, 1026)):
            got = comm.all_gather(gaussian(comm.rank, length), codec="lossless")
            assert got.tobytes() == gaussian(0, length).tobytes() + gaussian(1, length).tobytes()

    pycomm.run_local(fn, 2)


@settings(max_examples=25)
@given(st.lists(st.binary(max_size=600), min_size=2, max_size=4), st.sampled_from([1, 2]))
def test_ranks_of_any_data(parts: list[bytes], nodes: int) -> None:
    """Also of different lengths, which counts= tells all ranks."""
    xs = [np.frombuffer(part[: len(part) // 2 * 2], np.uint16).view(BF16) for part in parts]

    def fn(comm: Communicator) -> bytes:
        return comm.all_gather(xs[comm.rank], counts=[x.size for x in xs], codec="lossless").tobytes()

    wanted = b"".join(x.tobytes() for x in xs)
    assert pycomm.run_local(fn, len(xs), nodes=nodes) == len(xs) * [wanted]


def test_the_arguments_of_the_plain_calls(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        me, n = comm.rank, comm.size
        codec = codecs.Lossless()
        x, whole = gaussian(me, 3000).reshape(30, 100), np.concatenate([gaussian(r, 3000) for r in range(n)])
        for shape in ((n * 30, 100), (n, 30, 100)):
            out = np.zeros(shape, BF16)
            assert comm.all_gather(x, out=out, codec=codec, tag="w", timeout=30, algorithm="ring") is out
            assert out.tobytes() == whole.tobytes()
        in_place = np.zeros(n * 3000, BF16)
        own = in_place[me * 3000 : (me + 1) * 3000]
        own[:] = x.ravel()
        comm.all_gather(own, out=in_place, codec=codec)
        assert in_place.tobytes() == whole.tobytes()
        counts = [3, 0, 7][:n]
        rows = comm.all_gather(x[: counts[me]], counts=counts, codec=codec)
        wanted = [gaussian(r, 3000)[: 100 * counts[r]] for r in range(n)]
        assert rows.shape == (sum(counts), 100) and rows.tobytes() == np.concatenate(wanted).tobytes()

        out = np.zeros_like(x)
        before = x.copy()
        assert comm.broadcast(x, root=1, out=out, codec=codec, tag="b") is out
        assert out.tobytes() == gaussian(1, 3000).tobytes() and x.tobytes() == before.tobytes()

        works = [
            comm.all_gather(x, codec=codec, async_op=True),
            comm.broadcast(out := x.copy(), root=2, codec=codec, async_op=True),
            comm.all_gather(x[:2], codec=codec, async_op=True),
        ]
        gathered, _, few = [work.wait() for work in works]
        assert gathered.tobytes() == whole.tobytes() and out.tobytes() == gaussian(2, 3000).tobytes()
        assert few.tobytes() == b"".join(gaussian(r, 3000)[:200].tobytes() for r in range(n))

        items = [gaussian(me, 300).reshape(3, 100), gaussian(me + 10, 1), gaussian(me + 20, 100_000)]
        comm.broadcast(items, root=1, codec=codec)
        assert [item.tobytes() for item in items] == [
            gaussian(1 + r, count).tobytes() for r, count in ((0, 300), (10, 1), (20, 100_000))
        ]
        bucket = pycomm.Bucket([np.full(70, me, "f"), np.full((5, 5), me + 0.5, "f")], "bfloat16")
        bucket.pack()
        comm.broadcast(bucket, root=2, codec=codec)
        bucket.unpack()
        assert (bucket.tensors[0] == 2).all() and (bucket.tensors[1] == 2.5).all()

    ranks(fn, 3)


def test_a_call_that_is_remembered_takes_its_data_as_they_are(ranks: Ranks) -> None:
    """On the same buffers: small, not to be made smaller on one rank, small again."""

    def fn(comm: Communicator) -> None:
        x, out = np.zeros(70_000, BF16), np.zeros(140_000, BF16)
        for step, makes in enumerate([(gaussian, gaussian), (noise, gaussian), (gaussian, np.zeros)] * 2):
            parts = [
                np.zeros(70_000, BF16) if make is np.zeros else make(step + r, 70_000)
                for r, make in enumerate(makes)
            ]
            x[:] = parts[comm.rank]
            comm.all_gather(x, out=out, codec="lossless")
            assert out.tobytes() == parts[0].tobytes() + parts[1].tobytes(), step
            comm.broadcast(x, root=step % 2, codec="lossless")
            assert x.tobytes() == parts[step % 2].tobytes(), step

    ranks(fn, 2)


def test_tensors(ranks: Ranks) -> None:
    torch = pytest.importorskip("torch")

    def fn(comm: Communicator) -> None:
        def of(rank: int) -> Any:
            return torch.randn(1000, generator=torch.Generator().manual_seed(rank), dtype=torch.bfloat16)

        gathered = comm.all_gather(of(comm.rank), codec="lossless")
        assert gathered.dtype == torch.bfloat16 and torch.equal(gathered, torch.cat([of(0), of(1)]))
        x = of(comm.rank)
        assert torch.equal(comm.broadcast(x, root=1, codec="lossless"), of(1))

    ranks(fn, 2)


MOVES = """
import sys
import numpy as np, ml_dtypes, pycomm

def fn(comm):
    for step in range(20):
        x = np.random.default_rng(step + 100 * comm.rank).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)
        comm.all_gather(x, codec="lossless")
        comm.broadcast(x, codec="lossless")
    comm.all_gather(np.zeros(1 << 20, ml_dtypes.bfloat16), codec="lossless")

pycomm.run_local(fn, 2, nodes=int(sys.argv[1]))
"""


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_calls_move_the_bytes_that_are_left_and_make_few_plans(nodes: str) -> None:
    """All of these plans are proved."""
    done = subprocess.run(
        [sys.executable, "-c", MOVES, nodes],
        env={"PYCOMM_DEBUG": "TRACE", "PYCOMM_VERIFY": "1", "OPENBLAS_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    for collective in ("all_gather", "broadcast"):
        found = re.findall(rf"new plan: {collective}\(count=(\d+), dtype=uint8", done.stderr)
        counts = {int(count) for count in found}
        bound = _native.lossless_bound(1 << 20)
        assert bound in counts  # made first, so that its errors come before anything moves
        counts.remove(bound)
        if collective == "all_gather":
            zeros = min(counts)
            assert zeros <= 0.51 * bound  # their exponents take no room
            counts.remove(zeros)
        assert len(counts) <= 2
        assert all(0.65 * 2 * (1 << 20) < count < 0.68 * 2 * (1 << 20) for count in counts)


def message_of(comm: Communicator, call: Callable[[], object]) -> str:
    with pytest.raises(pycomm.MismatchError) as caught:
        call()
        comm.barrier()  # the root of a broadcast need not wait for others
    return str(caught.value)


def test_differences_are_mismatches(ranks: Ranks) -> None:
    def counts(comm: Communicator) -> str:
        return message_of(comm, lambda: comm.all_gather(gaussian(0, 5 + comm.rank), codec="lossless"))

    def counts_of_broadcast(comm: Communicator) -> str:
        return message_of(comm, lambda: comm.broadcast(gaussian(0, 5 + comm.rank), codec="lossless"))

    def codec(comm: Communicator) -> str:
        mine = "lossless" if comm.rank == 1 else None
        return message_of(comm, lambda: comm.all_gather(gaussian(0, 5), codec=mine))

    def codec_of_broadcast(comm: Communicator) -> str:
        mine = "lossless" if comm.rank == 0 else None
        return message_of(comm, lambda: comm.broadcast(gaussian(0, 5), codec=mine))

    def other_codec(comm: Communicator) -> str:
        mine = "lossless" if comm.rank == 1 else "int8"
        return message_of(comm, lambda: comm.all_gather(gaussian(0, 5), codec=mine, step=1))

    def root(comm: Communicator) -> str:
        return message_of(comm, lambda: comm.broadcast(gaussian(0, 5), root=comm.rank, codec="lossless"))

    def tag(comm: Communicator) -> str:
        return message_of(
            comm, lambda: comm.all_gather(gaussian(0, 5), tag=f"layer {comm.rank}", codec="lossless")
        )

    for fn, words in (
        (counts, ["all_gather", "count=5", "count=6", "codec=lossless"]),
        (counts_of_broadcast, ["broadcast", "count=5", "count=6", "codec=lossless"]),
        (codec, ["dtype=bfloat16, codec=lossless", "dtype=bfloat16, algorithm"]),
        (codec_of_broadcast, ["dtype=bfloat16, codec=lossless", "dtype=bfloat16, root"]),
        (other_codec, ["codec=lossless", "codec=int8"]),
        (root, ["root=0", "root=1"]),
        (tag, ['"layer 0"', '"layer 1"']),
    ):
        for said in ranks(fn, 2):
            assert all(word in said for word in words), (fn.__name__, said)


def test_a_late_rank_is_named() -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 1:
            return
        with pytest.raises((pycomm.CommTimeoutError, pycomm.PeerLostError), match="rank 1"):
            comm.all_gather(gaussian(0, 5), codec="lossless", timeout=0.2)

    pycomm.run_local(fn, 2)


def test_errors_come_before_anything_moves(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = gaussian(comm.rank, 8)
        for error, words, call in (
            (
                ValueError,
                "all_reduce cannot carry lossless, all_gather and broadcast can: pass fp16, bf16",
                lambda: comm.all_reduce(x, codec="lossless"),
            ),
            (
                ValueError,
                "reduce_scatter cannot carry lossless",
                lambda: comm.reduce_scatter(x, codec=codecs.Lossless()),
            ),
            (
                ValueError,
                "broadcast cannot carry int8, all_reduce, reduce_scatter and all_gather can: pass lossless",
                lambda: comm.broadcast(x, codec="int8"),
            ),
            (
                TypeError,
                "codec lossless is for bfloat16; the buffer is float32",
                lambda: comm.all_gather(x.astype("f"), codec="lossless"),
            ),
            (
                TypeError,
                "codec lossless is for bfloat16; the buffer is int32",
                lambda: comm.broadcast(x.astype("i"), codec="lossless"),
            ),
            (
                TypeError,
                r"codec lossless is for bfloat16; `x\[1\]` is float32",
                lambda: comm.broadcast([x, x.astype("f")], codec="lossless"),
            ),
            (ValueError, "nonsense", lambda: comm.all_gather(x, codec="lossless", algorithm="nonsense")),
            (ValueError, "did you mean 'lossless'", lambda: comm.all_gather(x, codec="losless")),
            (
                ValueError,
                "lossless cannot be used with @wire",
                lambda: comm.all_gather(x, codec="lossless@wire"),
            ),
            (
                ValueError,
                "whose calls run several plans",
                lambda: comm.explain("all_gather", 8, "bfloat16", codec="lossless"),
            ),
        ):
            if comm.rank == 0:  # alone: so nothing can have moved
                with pytest.raises(error, match=words):
                    call()
        assert comm.all_gather(x, codec="lossless").size == 8 * comm.size

    ranks(fn, 2)
