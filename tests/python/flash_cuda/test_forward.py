"""The CUDA forward kernels against float64: every head dimension, length, mask, id pattern and layout they promise."""

import itertools
import math
import random
import zlib
from typing import Any

import pytest
import torch
from support.cases import ID_KINDS, UNALIGNED_DIMS, UNALIGNED_LAYOUTS, UNALIGNED_PAIRS
from support.problems import allowed_pairs, dense_attention, lay_out, make_ids, norm_error
from torch import Tensor

import selfattn  # noqa: F401

pytestmark = pytest.mark.gpu

LENGTHS = [1, 63, 64, 65, 127, 129, 1000]
HEAD_DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (8, 8), (40, 40), (80, 80), (160, 72)]
UNALIGNED = [*((dim, dim) for dim in UNALIGNED_DIMS), *UNALIGNED_PAIRS]
ROUNDING_OF_ONE = {torch.bfloat16: 2e-4, torch.float16: 2e-5, torch.float32: 2e-7}
"""Where the formula is exact, as in rows of one key: a result that falls to the other side of a tie, out of a few."""
LSE_ERROR = 1e-3
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CAPS = [0.5, 4.0, 30.0, 1e6]
"""Logits here are up to 9: most of them are beyond the first, some beyond 3/4 of the second, none of the others."""


def check_error(out: Tensor, expected: Tensor, call: dict[str, Any]) -> None:
    """At most twice that of the formula in the same precision."""
    peer = dense_attention(**call, precision=torch.float32, rounding=out.dtype)["out"]
    assert norm_error(out, expected) <= 2 * norm_error(peer, expected) + ROUNDING_OF_ONE[out.dtype]


def poison(q: Tensor, v: Tensor) -> None:
    """Leaves NaN in the memory that the next results are likely to be allocated in."""
    rows = torch.full((*q.shape[:3], v.shape[3]), math.nan, dtype=q.dtype, device="cuda")
    columns = torch.full((q.shape[0], q.shape[2], q.shape[1]), math.nan, device="cuda")
    del rows, columns


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor | None = None,
    kv_ids: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    **mask,
) -> None:
    """One call against the oracle: out, lse, rows without a key, nothing unwritten."""
    poison(q, v)
    call = {"q": q, "k": k, "v": v, "segment_ids": ids, "kv_segment_ids": kv_ids, "sinks": sinks, "softcap": softcap}
    call |= mask
    out, lse = torch.ops.selfattn.flash_attention(**call)
    expected, expected_lse = dense_attention(**call).values()
    check_error(out, expected, call)
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert (lse[~finite] == -math.inf).all()
    if finite.any():
        assert (lse.double() - expected_lse)[finite].abs().max() < LSE_ERROR
    hidden = ~allowed_pairs(q, k, ids, kv_segment_ids=kv_ids, **mask).any(-1)[:, 0]
    assert (out[hidden] == 0).all()


def random_qkv(
    dtype: torch.dtype,
    dims: tuple[int, int],
    num_queries: int,
    num_keys: int,
    heads: int = 2,
    kv_heads: int = 2,
    batch: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((num_queries, heads, dims[0]), (num_keys, kv_heads, dims[0]), (num_keys, kv_heads, dims[1]))
    return tuple((1.3 * torch.randn(batch, *shape, device="cuda")).to(dtype) for shape in shapes)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", HEAD_DIMS + UNALIGNED)
def test_dense(dims: tuple[int, int], dtype: torch.dtype, causal: bool) -> None:
    for length in LENGTHS:
        check(*random_qkv(dtype, dims, length, length), causal=causal)


@pytest.mark.parametrize("dims", [*HEAD_DIMS[:6], (33, 33), (99, 99), (129, 7), (5, 256)])
@pytest.mark.parametrize("kind", ID_KINDS)
def test_ids_of_every_kind(kind: str, dims: tuple[int, int]) -> None:
    for length, causal in itertools.product(LENGTHS, (True, False)):
        check(*random_qkv(torch.bfloat16, dims, length, length), make_ids(kind, 2, length).cuda(), causal=causal)


def test_many_tiles_of_documents() -> None:
    q, k, v = random_qkv(torch.bfloat16, (128, 128), 4097, 4097, heads=4, kv_heads=1)
    boundaries = torch.zeros(2, 4097, dtype=torch.int32)
    boundaries[:, torch.randperm(4097)[:12]] = 1
    ids = boundaries.cumsum(1).int().cuda()
    check(q, k, v, ids)
    ids[1] = ids[1, torch.randperm(4097, device="cuda")]  # one row in order, one in none
    check(q, k, v, ids)
    check(q, k, v, ids.long(), causal=False)


@pytest.mark.parametrize("kind", [None, "documents", "shuffled", "packed"])
def test_heads_beyond_one_section(kind: str | None) -> None:
    """A head's result does not depend on the company it is scheduled in."""
    length = 8192
    q, k, v = random_qkv(torch.bfloat16, (128, 128), length, length, heads=16, kv_heads=16)
    if kind == "documents":
        starts = torch.zeros(2, length, dtype=torch.int32)
        starts[:, torch.randperm(length)[:20]] = 1
        ids = starts.cumsum(1).int().cuda()
    else:
        ids = None if kind is None else make_ids(kind, 2, length).cuda()
    for causal in (True, False):
        out, lse = torch.ops.selfattn.flash_attention(q, k, v, ids, causal)
        for head in (0, 7, 15):
            one = slice(head, head + 1)
            alone = torch.ops.selfattn.flash_attention(q[:, :, one], k[:, :, one], v[:, :, one], ids, causal)
            assert torch.equal(out[:, :, one], alone[0])
            assert torch.equal(lse[:, one], alone[1])
        # And one head's last rows against the oracle.
        rows = slice(length - 256, length)
        call = {"q": q[:, rows, :1], "k": k[:, :, :1], "v": v[:, :, :1], "causal": causal}
        if ids is not None:
            call |= {"segment_ids": ids[:, rows], "kv_segment_ids": ids}
        check_error(out[:, rows, :1], dense_attention(**call)["out"], call)


def test_key_ids_that_no_query_has() -> None:
    """Heads of several sections: the first block is loaded before the ids are known, and then counts for nothing."""
    q, k, v = random_qkv(torch.bfloat16, (128, 128), 700, 700, heads=160, kv_heads=160, batch=1)
    ids = torch.full((1, 700), 3, dtype=torch.int32, device="cuda")
    kv_ids = torch.full_like(ids, 5)
    check(q, k, v, ids, kv_ids)
    kv_ids[:, :300] = 3
    check(q, k, v, ids, kv_ids)


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_grouped_queries(heads: int) -> None:
    for dims in HEAD_DIMS[:6]:
        check(*random_qkv(torch.bfloat16, dims, 300, 300, heads=heads, kv_heads=1))


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 700), (100, 1000), (700, 65), (1000, 1)])
def test_lengths_that_differ(num_queries: int, num_keys: int) -> None:
    for dims, causal in itertools.product(HEAD_DIMS[:6], (True, False)):
        q, k, v = random_qkv(torch.float16, dims, num_queries, num_keys)
        check(q, k, v, causal=causal)
        ids, kv_ids = make_ids("mixed_padding", 2, num_queries).cuda(), make_ids("mixed_padding", 2, num_keys).cuda()
        check(q, k, v, ids, kv_ids, causal=causal)


@pytest.mark.parametrize(("left", "right"), [(0, 0), (17, -1), (-1, 33), (200, 150), (5000, 5000)])
def test_windows(left: int, right: int) -> None:
    for dims, length in itertools.product([(64, 64), (128, 128), (256, 256)], (129, 1000)):
        q, k, v = random_qkv(torch.bfloat16, dims, length, length)
        for causal, kind in itertools.product((True, False), (None, "packed", "shuffled")):
            ids = None if kind is None else make_ids(kind, 2, length).cuda()
            check(q, k, v, ids, causal=causal, window_left=left, window_right=right)


@pytest.mark.parametrize("kind", [None, "packed", "mixed_padding"])
def test_sinks(kind: str | None) -> None:
    q, k, v = random_qkv(torch.bfloat16, (128, 128), 300, 300, heads=4)
    ids = None if kind is None else make_ids(kind, 2, 300).cuda()
    check(q, k, v, ids, sinks=3 * torch.randn(4, device="cuda"))


def test_layouts_without_a_copy() -> None:
    for dims in [(64, 64), (80, 80), (128, 128), (256, 256)]:
        dim = dims[0]
        heads_first = [(torch.randn(2, 3, 200, dim, device="cuda")).bfloat16().transpose(1, 2) for _ in range(3)]
        check(*heads_first)
        packed = torch.randn(2, 200, 3 + 1 + 1, dim, device="cuda").bfloat16()
        check(packed[:, :, :3], packed[:, :, 3:4], packed[:, :, 4:])
        padded = torch.randn(2, 333, 3, dim + 8, device="cuda").half()
        check(*(padded[:, :200, :, :dim] for _ in range(3)))


@pytest.mark.parametrize("layout", UNALIGNED_LAYOUTS)
@pytest.mark.parametrize("dims", UNALIGNED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_rows_in_every_layout(dtype: torch.dtype, dims: tuple[int, int], layout: str) -> None:
    """NaN stands before and behind each row, and the first row begins at any element."""
    check(*(lay_out(tensor, layout) for tensor in random_qkv(dtype, dims, 200, 200, heads=3, kv_heads=3)))


def test_layouts_with_a_copy() -> None:
    q, k, v = random_qkv(torch.bfloat16, (64, 64), 200, 200, heads=4, kv_heads=1)
    check(q, k.expand(-1, -1, 4, -1), v.expand(-1, -1, 4, -1))
    odd = torch.randn(2, 200, 4, 65, device="cuda").bfloat16()
    check(odd[..., :64], odd[..., 1:], odd[..., :64])


def test_error_is_that_of_the_precision() -> None:
    for dtype, causal in itertools.product(DTYPES, (True, False)):
        q, k, v = random_qkv(dtype, (128, 128), 1000, 1000)
        expected = dense_attention(q, k, v, causal=causal)["out"]
        out, _ = torch.ops.selfattn.flash_attention(q, k, v, causal=causal)
        peer = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
        )
        ours, theirs = (((x.double() - expected).norm()).item() for x in (out, peer.transpose(1, 2)))
        assert ours <= 2 * theirs


def test_random_calls() -> None:
    generator = random.Random(zlib.crc32(str(torch.initial_seed()).encode()))
    for _ in range(300):
        pick = generator.choice
        kind, dims, num_queries, kv_heads = (
            pick([None, *ID_KINDS]),
            pick(HEAD_DIMS + UNALIGNED),
            pick([1, 65, 192, 200, 500, 1111]),
            pick([1, 2]),
        )
        crosses = pick([True, False, False])
        num_keys = pick([1, 64, 129, 700]) if crosses else num_queries
        q, k, v = random_qkv(
            pick(DTYPES), dims, num_queries, num_keys, heads=kv_heads * pick([1, 2, 4]), kv_heads=kv_heads
        )
        ids = None if kind is None else make_ids(kind, 2, num_queries).cuda()
        kv_ids = make_ids(kind, 2, num_keys).cuda() if kind is not None and crosses else None
        sinks = torch.randn(q.shape[2], device="cuda") if pick([True, False, False]) else None
        mask = {
            "causal": pick([True, False]),
            "window_left": pick([-1, -1, 0, 30, 200]),
            "window_right": pick([-1, -1, 0, 50]),
        }
        check(q, k, v, ids, kv_ids, sinks, pick([0.0, 0.0, *CAPS]), **mask)


@pytest.mark.parametrize("kind", [None, "packed", "shuffled"])
@pytest.mark.parametrize("dims", [*HEAD_DIMS[:6], (63, 63), (99, 99), (250, 250)])
def test_repeats_are_bitwise_equal(dims: tuple[int, int], kind: str | None) -> None:
    q, k, v = random_qkv(torch.bfloat16, dims, 2500, 2500, heads=8)
    ids = None if kind is None else make_ids(kind, 2, 2500).cuda()
    first = torch.ops.selfattn.flash_attention(q, k, v, ids)
    for _ in range(4):
        again = torch.ops.selfattn.flash_attention(q, k, v, ids)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
def test_graph_replays_with_other_ids(id_type: torch.dtype) -> None:
    q, k, v = random_qkv(torch.bfloat16, (128, 128), 1500, 1500, heads=4)
    ids = make_ids("packed", 2, 1500).to("cuda", id_type)
    torch.ops.selfattn.flash_attention(q, k, v, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with_ids = torch.ops.selfattn.flash_attention(q, k, v, ids)
        dense = torch.ops.selfattn.flash_attention(q, k, v, causal=False)
    for kind in ("packed", "shuffled", "all_padding", "one_document", "packed"):
        ids.copy_(make_ids(kind, 2, 1500))
        for result in (*with_ids, *dense):
            result.fill_(math.nan)
        graph.replay()
        eager = torch.ops.selfattn.flash_attention(q, k, v, ids)
        assert torch.equal(with_ids[0], eager[0])
        assert torch.equal(with_ids[1], eager[1])
        assert torch.equal(dense[0], torch.ops.selfattn.flash_attention(q, k, v, causal=False)[0])


def test_two_streams_at_once() -> None:
    q, k, v = random_qkv(torch.bfloat16, (128, 128), 2000, 2000, heads=8)
    ids = make_ids("packed", 2, 2000).cuda()
    expected = [torch.ops.selfattn.flash_attention(q, k, v, x)[0] for x in (None, ids)]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], [[], []]
    for _ in range(10):
        for stream, x, into in zip(streams, (None, ids), results, strict=True):
            with torch.cuda.stream(stream):
                into.append(torch.ops.selfattn.flash_attention(q, k, v, x)[0])
    torch.cuda.synchronize()
    for into, right in zip(results, expected, strict=True):
        assert all(torch.equal(result, right) for result in into)


@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
def test_no_synchronisation(id_type: torch.dtype) -> None:
    q, k, v = random_qkv(torch.bfloat16, (64, 64), 256, 256)
    ids = make_ids("packed", 2, 256).to("cuda", id_type)
    torch.ops.selfattn.flash_attention(q, k, v, ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.selfattn.flash_attention(q, k, v, ids)
        torch.ops.selfattn.flash_attention(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [*HEAD_DIMS, (33, 33), (99, 99), (5, 256), (127, 65)])
def test_softcap(dims: tuple[int, int], dtype: torch.dtype, softcap: float) -> None:
    for length, causal in itertools.product(LENGTHS, (True, False)):
        check(*random_qkv(dtype, dims, length, length), causal=causal, softcap=softcap)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("kind", ID_KINDS)
def test_softcap_with_ids_windows_and_sinks(kind: str, softcap: float) -> None:
    for dims, (heads, kv_heads) in itertools.product(
        [(64, 64), (128, 128), (256, 256), (63, 9), (99, 101)], [(2, 2), (4, 1)]
    ):
        q, k, v = random_qkv(torch.bfloat16, dims, 300, 300, heads=heads, kv_heads=kv_heads)
        ids, sinks = make_ids(kind, 2, 300).cuda(), torch.randn(heads, device="cuda")
        check(q, k, v, ids, softcap=softcap)
        check(q, k, v, ids, sinks=sinks, causal=False, softcap=softcap)
        check(q, k, v, ids, causal=False, window_left=40, window_right=9, softcap=softcap)
        q, k, v = random_qkv(torch.bfloat16, dims, 200, 333, heads=heads, kv_heads=kv_heads)
        ids, kv_ids = make_ids(kind, 2, 200).cuda(), make_ids(kind, 2, 333).cuda()
        check(q, k, v, ids, kv_ids, sinks, softcap=softcap)
