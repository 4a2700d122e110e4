"""The CUDA kernels over a KV cache give what the promise asks for: in calls of every kind, replayed from a CUDA graph,
from two streams, and with bits that depend on nothing but the row where keys are split by a fixed number; values out of
range stop the device."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.kv_cache import CacheCase, attention, cases, check_results, replays
from support.problems import dense_attention
from torch import Tensor

import selfattn

pytestmark = pytest.mark.gpu

OPS = torch.ops.selfattn
DTYPES = [torch.bfloat16, torch.float16]
# Heads that share a kv head times queries, which choose the tile: fewer than one holds, one, and several.
GROUPS = [(1, 1), (4, 1), (8, 4), (16, 1), (5, 7), (20, 3)]


def flash(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return selfattn.attention_with_kv_cache_lse(**call, backend="flash")


def check(case: CacheCase) -> None:
    call = case.make("cuda")
    check_results(call, *flash(call))


def served(case: CacheCase) -> CacheCase:
    """The same with a page size that the kernels take."""
    return case if case.pages_per_row == 1 else case.with_(page_size=16 * math.ceil(case.page_size / 16))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(dim=16, value_dim=0, dtype=torch.bfloat16))
def test_random_calls(case: CacheCase) -> None:
    check(served(case))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(dim=64, value_dim=32, dtype=torch.float16, page_size=48, pages_per_row=5))
def test_random_calls_of_several_blocks_of_keys(case: CacheCase) -> None:
    check(served(case))


@pytest.mark.parametrize("split_keys", [0, 64, 512])
@pytest.mark.parametrize(("group", "num_queries"), GROUPS)
@pytest.mark.parametrize("dim", [8, 64, 72, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dimensions_and_groups(
    dtype: torch.dtype, dim: int, group: int, num_queries: int, split_keys: int
) -> None:
    shape = {"num_heads": 2 * group, "num_kv_heads": 2, "num_queries": num_queries, "dim": dim}
    pages = {"rows": 2, "page_size": 16, "pages_per_row": 12}
    check(CacheCase(**shape, **pages, dtype=dtype, split_keys=split_keys))


@pytest.mark.parametrize(("dim", "value_dim"), [(192, 128), (64, 256), (256, 64), (40, 8)])
def test_value_head_dimensions(dim: int, value_dim: int) -> None:
    check(CacheCase(dim=dim, value_dim=value_dim, page_size=32, pages_per_row=5, dtype=torch.bfloat16))


@pytest.mark.parametrize("ids", [None, "decode", "chunks", "any_order"])
@pytest.mark.parametrize("split_keys", [0, 128])
def test_rows_of_thousands_of_keys(ids: str | None, split_keys: int) -> None:
    check(
        CacheCase(
            rows=5,
            page_size=64,
            pages_per_row=50,
            num_queries=5,
            dim=128,
            dtype=torch.bfloat16,
            ids=ids,
            split_keys=split_keys,
        )
    )


@pytest.mark.parametrize("rows", [255, 300, 1100])
def test_more_rows_than_a_warp_counts(rows: int) -> None:
    check(CacheCase(rows=rows, page_size=16, pages_per_row=2, num_heads=2, num_kv_heads=1, dtype=torch.bfloat16))


@pytest.mark.parametrize("num_queries", [200, 1500])
def test_more_tokens_than_a_tile(num_queries: int) -> None:
    shape = {"rows": 4, "num_queries": num_queries, "num_heads": 2, "num_kv_heads": 2}
    for ids in ("chunks", "any_order", "padded"):
        call = CacheCase(**shape, page_size=16, pages_per_row=4, ids=ids, dtype=torch.bfloat16).make("cuda")
        check_results(call, *flash(call), by_rows=True)


@pytest.mark.parametrize("options", [{}, {"window_left": 30}, {"window_left": 3}, {"softcap": 20.0, "has_sinks": True}])
def test_tree_drafts_across_two_blocks_of_keys(options: dict[str, Any]) -> None:
    for seed in range(10):
        check(
            CacheCase(
                num_queries=32,
                page_size=112,
                pages_per_row=1,
                dim=64,
                dtype=torch.bfloat16,
                has_draft_mask=True,
                seed=seed,
                **options,
            )
        )


def gathered_attention(call: dict[str, Any]) -> Tensor:
    """Of one query a row and its whole cache, in float64, on the call's device: for more keys than loops take."""
    out = call["q"].new_zeros(*call["q"].shape[:3], call["v_cache"].shape[3], dtype=torch.float64)
    for row, length in enumerate(call["lengths"].tolist()):
        pages = slice(row, row + 1) if call.get("page_table") is None else call["page_table"][row].long()
        k, v = (call[name][pages].flatten(0, 1)[:length].double() for name in ("k_cache", "v_cache"))
        if length:
            out[row] = dense_attention(call["q"][row : row + 1].double(), k[None], v[None])["out"]
    return out


LENGTHS = {
    "equal": lambda rows: torch.full((rows,), 777),
    "about equal": lambda rows: 700 + 13 * torch.arange(rows) % 97,
    "one long": lambda rows: torch.where(torch.arange(rows) == rows // 2, 30_000, torch.arange(rows) % 300),
}


# Rows and kv heads: fewer than there are SMs, in clusters of one thread block and of several, and more. With so large a
# capacity the kernel finds out by the lengths whether rows are levelled.
@pytest.mark.parametrize("capacity", [2048, 32768])
@pytest.mark.parametrize("lengths", list(LENGTHS))
@pytest.mark.parametrize(("rows", "kv_heads", "group"), [(1, 1, 4), (2, 8, 4), (3, 2, 16), (40, 2, 8), (100, 2, 4)])
@pytest.mark.parametrize("page_size", [0, 16, 96])
def test_rows_of_many_lengths(
    page_size: int, rows: int, kv_heads: int, group: int, lengths: str, capacity: int
) -> None:
    torch.manual_seed(0)
    per_row = math.ceil(capacity / page_size) if page_size else 1
    counts = LENGTHS[lengths](rows).clamp(max=capacity)
    pages = rows if page_size == 0 else 2048
    shape = (pages, page_size or capacity, kv_heads, 64)
    call = {
        "q": torch.randn(rows, 1, kv_heads * group, 64, device="cuda").bfloat16(),
        "k_cache": torch.randn(shape, device="cuda").bfloat16(),
        "v_cache": torch.randn(shape, device="cuda").bfloat16(),
        "lengths": counts.int().cuda(),
        "page_table": torch.randint(pages, (rows, per_row), device="cuda").int() if page_size else None,
    }
    out, _ = flash(call)
    torch.testing.assert_close(out.double(), gathered_attention(call), atol=5e-3, rtol=1e-2)


def test_slots_behind_a_row_do_not_matter() -> None:
    """Whatever they hold: the first copies of a row start before its length is known."""
    torch.manual_seed(0)
    q = torch.randn(2, 1, 8, 64, device="cuda").half()
    k, v = torch.randn(2, 2, 4096, 2, 64, device="cuda").half()
    lengths = torch.tensor([0, 1001], device="cuda")
    want = [selfattn.attention_with_kv_cache(q, k, v, lengths, backend="flash")]
    for value in (math.nan, math.inf, -math.inf):
        for cache in (k, v):
            cache[0], cache[1, 1001:] = value, value
        want.append(selfattn.attention_with_kv_cache(q, k, v, lengths, backend="flash"))
    assert all(torch.equal(want[0], found) for found in want[1:])
    assert want[0][0].abs().sum() == 0


@pytest.mark.parametrize("num_queries", [1, 3, 8, 20])
def test_caches_that_rows_or_heads_share(num_queries: int) -> None:
    q = torch.randn(6, num_queries, 8, 64, device="cuda").bfloat16()
    k, v = torch.randn(2, 1, 500, 1, 64, device="cuda").bfloat16()
    lengths = torch.tensor([500, 20, 333, 64, 7, 499], device="cuda")
    shared = [cache.expand(6, 500, 4, 64) for cache in (k, v)]
    assert all(
        map(
            torch.equal,
            OPS.attention_with_kv_cache_lse(q, *shared, lengths, backend="flash"),
            OPS.attention_with_kv_cache_lse(q, *(c.contiguous() for c in shared), lengths, backend="flash"),
        )
    )
    over = k.new_zeros(1, 1, 1, 64).expand(6, 500, 4, 64)
    with pytest.raises(NotImplementedError, match="tokens that do not lie over each other"):
        OPS.attention_with_kv_cache(q, over, over, lengths, backend="flash")


@pytest.mark.parametrize("scale", [-0.3, 0.0, 20.0])
def test_scales(scale: float) -> None:
    check(CacheCase(page_size=32, pages_per_row=4, dim=64, dtype=torch.float16, qk_scale=scale))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32, torch.float64], ids=str)
def test_sinks_are_read_in_every_dtype(dtype: torch.dtype) -> None:
    call = CacheCase(page_size=32, pages_per_row=4, dim=64, dtype=torch.bfloat16, has_sinks=True).make("cuda")
    call["sinks"] = call["sinks"].to(dtype)
    results = flash(call)
    check_results(call, *results)
    assert all(map(torch.equal, results, flash(call | {"sinks": call["sinks"].float()})))


def test_a_value_that_is_not_finite_reaches_those_alone_who_see_it() -> None:
    call = CacheCase(
        rows=1, num_queries=4, page_size=96, dim=64, lengths="full", table=None, dtype=torch.bfloat16
    ).make("cuda")
    length = int(call["lengths"])
    for offset, value in enumerate((math.inf, -math.inf, math.nan)):
        call["v_cache"][0, length - 1 - offset, :, offset] = value
    call["k_cache"][0, length - 1, 1] = math.nan  # which the last query sees, in one head
    out, lse = flash(call)
    want, want_lse = attention(call)
    for mine, exact in ((out, want), (lse, want_lse)):
        assert torch.equal(mine.isnan().cpu(), exact.isnan())
        assert torch.equal(mine.isinf().cpu(), exact.isinf())
        difference = (mine.cpu() - exact)[exact.isfinite()]
        assert difference.abs().max() < 0.05


# ---------------------------------------------------------------- graphs, streams, bits


def big_case(**changes: Any) -> CacheCase:
    return CacheCase(rows=4, page_size=32, pages_per_row=40, num_heads=8, dim=64, dtype=torch.bfloat16).with_(**changes)


@pytest.mark.parametrize("options", [{}, {"ids": "chunks", "num_queries": 9}, {"split_keys": 256}])
def test_a_graph_is_replayed_with_other_lengths_tables_and_ids(options: dict[str, Any]) -> None:
    calls = [
        big_case(seed=seed, lengths=kind, **options).make("cuda")
        for seed, kind in enumerate(("one", "mixed", "full", "zero"))
    ]
    for call, results in replays(flash, calls):
        check_results(call, *results)


def test_two_streams_do_not_meet() -> None:
    calls = [big_case(seed=seed, lengths="mixed").make("cuda") for seed in range(2)]
    expected = [flash(call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for _ in range(50):
        for stream, call, found in zip(streams, calls, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(flash(call))
    torch.cuda.synchronize()
    for want, found in zip(expected, results, strict=True):
        for result in found:
            assert all(map(torch.equal, result, want))


@pytest.mark.parametrize("split_keys", [64, 192])
def test_bits_of_a_row_do_not_depend_on_its_batch_where_keys_are_split(split_keys: int) -> None:
    call = big_case(rows=30, lengths="mixed", split_keys=split_keys).make("cuda")
    out, lse = flash(call)
    for row in (0, 7, 29):
        one = call | {name: call[name][row : row + 1] for name in ("q", "lengths", "page_table")}
        own_out, own_lse = flash(one)
        assert torch.equal(own_out[0], out[row])
        assert torch.equal(own_lse[0], lse[row])


def test_bits_of_a_token_do_not_depend_on_its_ragged_batch_where_keys_are_split() -> None:
    call = big_case(rows=6, ids="decode", num_queries=6, lengths="mixed", split_keys=128).make("cuda")
    out, _ = flash(call)
    for token in range(6):
        one = call | {name: call[name][:, token : token + 1] for name in ("q", "segment_ids")}
        assert torch.equal(flash(one)[0][0, 0], out[0, token])


def test_a_call_gives_the_same_bits_every_time() -> None:
    call = big_case(lengths="mixed").make("cuda")
    first = flash(call)
    for _ in range(20):
        assert all(map(torch.equal, flash(call), first))


def test_a_token_by_token_run_equals_the_packed_forward() -> None:
    torch.manual_seed(0)
    length, heads, kv_heads, dim = 150, 4, 2, 64
    q, k, v = (torch.randn(2, length, n, dim, device="cuda").bfloat16() for n in (heads, kv_heads, kv_heads))
    expected = selfattn.multihead_attention(q, k, v, backend="flash")
    found = [
        selfattn.attention_with_kv_cache(q[:, i : i + 1], k, v, torch.full((2,), i + 1, device="cuda"), backend="flash")
        for i in range(length)
    ]
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-2, rtol=2e-2)


# ---------------------------------------------------------------- what is refused, and what stops the device


def test_auto_takes_the_kernels() -> None:
    call = big_case().make("cuda")
    assert selfattn.explain_kv_cache_backend(**call).splitlines()[0] == "flash: chosen"


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (CacheCase(page_size=24, dtype=torch.bfloat16), "multiple of 16 tokens"),
        (CacheCase(page_size=16, dim=20, dtype=torch.bfloat16), "multiples of 8"),
        (CacheCase(page_size=16, dim=264, dtype=torch.bfloat16), "up to 256"),
        (CacheCase(page_size=16, dtype=torch.float32), "bfloat16 or float16 on CUDA"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(case: CacheCase, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        flash(case.make("cuda"))


def test_caches_with_unaligned_rows_are_refused() -> None:
    call = big_case(table=None).make("cuda")
    for name in ("k_cache", "v_cache"):
        odd = torch.nn.functional.pad(call[name], (1, 7))[..., 1:-7]
        with pytest.raises(NotImplementedError, match=f"{name} must have a contiguous last dimension"):
            flash(call | {name: odd})


OUT_OF_RANGE = {
    "lengths[0] = -1": "lengths must fit the cache",
    "lengths[0] = 65": "lengths must fit the cache",
    "page_table[0, 0] = 8": "the page table must name pages of the cache",
    "page_table[0, 3] = -1": "the page table must name pages of the cache",
    "segment_ids[0, 1] = 2": "segment ids must name rows of the cache",
    "positions[0, 0] = 2**31": "positions must fit in int32",
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "message"), OUT_OF_RANGE.items())
def test_values_out_of_range_stop_the_device(change: str, message: str) -> None:
    arguments = ["segment_ids=segment_ids"] * ("segment_ids" in change) + ["positions=positions"] * (
        "positions" in change
    )
    program = f"""
import torch, selfattn
q = torch.randn(1, 2, 2, 64, device="cuda").bfloat16()
cache = torch.randn(8, 16, 1, 64, device="cuda").bfloat16()
lengths = torch.tensor([64], device="cuda")
page_table = torch.tensor([[5, 2, 7, 0]], device="cuda")
segment_ids = torch.zeros(1, 2, dtype=torch.int64, device="cuda")
positions = torch.tensor([[62, 63]], device="cuda")
{change}
selfattn.attention_with_kv_cache(q, cache, cache, lengths, page_table, {", ".join([*arguments, 'backend="flash"'])})
torch.cuda.synchronize()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert message in run.stdout + run.stderr
