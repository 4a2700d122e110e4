"""Chunks of queries over a KV cache, as prefill gives them: on CUDA the forward kernel takes them, from dense rows and
from pages, of all rows or of those that ids name. Each call is as poisoned as the others' (support/kv_cache.py): NaN in
every slot that no query sees, entries of the table that name no page."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from support.kv_cache import (
    LAYOUTS,
    WINDOWS,
    CacheCase,
    attention,
    cases,
    check_results,
    formula,
    replays,
    row_calls,
    rows_formula,
    tokens,
    visible_pairs,
    visible_slots,
)
from support.launches import launches
from torch import Tensor

import selfattn

DTYPES = [torch.bfloat16, torch.float16]
PAGES: dict[str, dict[str, Any]] = {
    "dense": {"table": None, "page_size": 300, "pages_per_row": 1},
    "one_page": {"page_size": 300, "pages_per_row": 1},
    "pages16": {"page_size": 16, "pages_per_row": 20},
    "pages48": {"page_size": 48, "pages_per_row": 7},
    "pages64": {"page_size": 64, "pages_per_row": 5},
    "pages112": {"page_size": 112, "pages_per_row": 3},
    "pages128": {"page_size": 128, "pages_per_row": 3},
    "pages256": {"page_size": 256, "pages_per_row": 2},
}


def chunks(device: str, **fields: Any) -> CacheCase:
    """On CUDA so many heads and rows that the forward kernel is the faster one, on every card."""
    many = (
        {"rows": 4, "num_heads": 32, "num_kv_heads": 4}
        if device == "cuda"
        else {"rows": 2, "num_heads": 2, "num_kv_heads": 1}
    )
    return CacheCase(**({"num_queries": 130, "dim": 64, "dtype": torch.bfloat16} | PAGES["pages64"] | many | fields))


def flash(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return selfattn.attention_with_kv_cache_lse(**call, backend="flash")


def check(case: CacheCase, device: str) -> None:
    call = case.make(device)
    check_results(call, *flash(call), by_rows=True)


# ---------------------------------------------------------------- calls of every kind


@pytest.mark.parametrize("pages", ["dense", "pages16", "pages64"])
@pytest.mark.parametrize("dim", [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (72, 40), (8, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dimensions(dtype: torch.dtype, dim: tuple[int, int], pages: str, device: str) -> None:
    check(chunks(device, dtype=dtype, dim=dim[0], value_dim=dim[1], **PAGES[pages]), device)


@pytest.mark.parametrize("num_queries", [67, 128, 200, 513])
@pytest.mark.parametrize("lengths", ["mixed", "zero", "one", "edges", "full"])
@pytest.mark.parametrize("pages", PAGES)
def test_lengths_and_pages(pages: str, lengths: str, num_queries: int, device: str) -> None:
    for dim in (64, 256):  # key blocks of 128 and of 80 on Hopper
        check(chunks(device, dim=dim, lengths=lengths, num_queries=num_queries, **PAGES[pages]), device)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [*WINDOWS, (100, -1), (40, 70), (0, 0)])
@pytest.mark.parametrize("pages", ["dense", "pages16", "pages128"])
def test_windows(pages: str, window: tuple[int, int], causal: bool, device: str) -> None:
    windows = {"window_left": window[0], "window_right": window[1]}
    for lengths in ("mixed", "edges"):
        check(chunks(device, dim=128, causal=causal, lengths=lengths, **windows, **PAGES[pages]), device)


@pytest.mark.parametrize("options", [{}, {"window_left": 50}, {"causal": False}])
@pytest.mark.parametrize("more", [{"softcap": 1.5}, {"has_sinks": True}, {"softcap": 20.0, "has_sinks": True}])
@pytest.mark.parametrize("pages", ["dense", "pages48"])
def test_softcap_and_sinks(pages: str, more: dict[str, Any], options: dict[str, Any], device: str) -> None:
    for dim in (64, 128, 256):
        check(chunks(device, dim=dim, **more, **options, **PAGES[pages]), device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pages", PAGES)
def test_layouts(pages: str, layout: str, device: str) -> None:
    check(chunks(device, layout=layout, index_dtype=torch.int64, **PAGES[pages]), device)


@pytest.mark.parametrize("table", ["ordered", "shared", "ring"])
def test_tables(table: str, device: str) -> None:
    check(chunks(device, table=table), device)


@pytest.mark.parametrize("heads", [(32, 32), (32, 1), (40, 8), (24, 3)])
def test_groups_of_heads(heads: tuple[int, int], device: str) -> None:
    check(chunks(device, num_heads=heads[0], num_kv_heads=heads[1]), device)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 30.0, 3000.0])
@pytest.mark.parametrize("pages", ["dense", "pages16"])
def test_scales_and_large_logits(pages: str, scale: float, device: str) -> None:
    check(chunks(device, dtype=torch.float16, qk_scale=scale, lengths="full", **PAGES[pages]), device)


@pytest.mark.parametrize("page_size", [0, 16, 128])
def test_rows_of_thousands_of_keys(page_size: int, device: str) -> None:
    length = 8192 if device == "cuda" else 1024
    pages = PAGES["dense"] | {"page_size": length}
    if page_size:
        pages = {"page_size": page_size, "pages_per_row": length // page_size}
    check(chunks(device, dim=128, lengths="mixed", **pages), device)


@pytest.mark.parametrize("pages", ["dense", "pages16", "pages256"])
@pytest.mark.parametrize("dim", [64, 256])
def test_a_value_that_is_not_finite_reaches_those_alone_who_see_it(dim: int, pages: str, device: str) -> None:
    case = chunks(device, dim=dim, lengths="full", **PAGES[pages])
    call = case.make(device)
    clean = {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}
    table = call.get("page_table")
    row = case.rows - 1
    for back, value in enumerate((math.inf, -math.inf, math.nan)):  # in the last slots, which the last queries see
        slot = case.capacity - 1 - back
        page = row if table is None else int(table[row, slot // case.page_size])
        call["v_cache"][page, slot % case.page_size, :, back] = value
    out, lse = flash(call)
    own_out, own_lse = flash(clean)
    assert torch.equal(lse, own_lse)
    assert torch.equal(out[:row], own_out[:row])
    assert torch.equal(out[row, :-3], own_out[row, :-3])
    for back, is_wanted in enumerate((torch.isposinf, torch.isneginf, torch.isnan)):
        seeing = out[row, case.num_queries - 1 - back :, :, back]
        assert is_wanted(seeing).all()
        assert out[row, : case.num_queries - 1 - back, :, back].isfinite().all()
    assert torch.equal(out[row, -3:, :, 3:], own_out[row, -3:, :, 3:])


def test_a_prefill_in_chunks_equals_the_packed_forward(device: str) -> None:
    torch.manual_seed(0)
    length, step, rows, heads, dim = 512, 128, 4, 32, 64
    q, k, v = (torch.randn(rows, length, n, dim, device=device).bfloat16() for n in (heads, 4, 4))
    expected = selfattn.multihead_attention(q, k, v, backend="flash")
    found = [
        flash(
            {
                "q": q[:, at : at + step],
                "k_cache": k,
                "v_cache": v,
                "lengths": torch.full((rows,), at + step).to(device),
            }
        )
        for at in range(0, length, step)
    ]
    torch.testing.assert_close(torch.cat([out for out, _ in found], 1), expected, atol=2e-2, rtol=2e-2)


# ---------------------------------------------------------------- chunks that ids name


def ragged(device: str, **fields: Any) -> CacheCase:
    """On CUDA so many heads and tokens that the forward kernel takes the rows of 64 queries and more."""
    sizes = (
        {"rows": 5, "num_heads": 16, "num_kv_heads": 4, "num_queries": 600}
        if device == "cuda"
        else {"rows": 4, "num_heads": 2, "num_kv_heads": 1, "num_queries": 80}
    )
    usual = {"ids": "step", "dim": 64, "dtype": torch.bfloat16}
    return CacheCase(**(usual | PAGES["pages64"] | sizes | fields))


@pytest.mark.parametrize("ids", ["step", "chunks", "padded", "any_order", "all_padding"])
@pytest.mark.parametrize("pages", ["dense", "pages16", "pages64"])
def test_ids(pages: str, ids: str, device: str) -> None:
    for seed, lengths in enumerate(("mixed", "full")):
        check(ragged(device, ids=ids, lengths=lengths, seed=seed, **PAGES[pages]), device)


@pytest.mark.parametrize("dim", [(128, 128), (192, 128), (256, 256), (72, 40)])
@pytest.mark.parametrize("pages", ["dense", "pages48"])
def test_head_dimensions_with_ids(pages: str, dim: tuple[int, int], device: str) -> None:
    check(ragged(device, dtype=torch.float16, dim=dim[0], value_dim=dim[1], **PAGES[pages]), device)


@pytest.mark.parametrize("options", [{"window_left": 100}, {"window_right": 5, "causal": False}, {"causal": False}])
@pytest.mark.parametrize("more", [{}, {"softcap": 20.0, "has_sinks": True, "qk_scale": -0.3}])
def test_options_with_ids(more: dict[str, Any], options: dict[str, Any], device: str) -> None:
    for lengths in ("mixed", "edges"):
        check(ragged(device, dim=128, lengths=lengths, **options, **more), device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_ids(layout: str, device: str) -> None:
    check(ragged(device, layout=layout, index_dtype=torch.int64, **PAGES["pages16"]), device)


@pytest.mark.parametrize("num_queries", [64, 70, 1200])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_numbers_of_rows_and_tokens(rows: int, num_queries: int, device: str) -> None:
    heads = {"num_heads": 32, "num_kv_heads": 8} if device == "cuda" else {}
    tokens = num_queries if device == "cuda" else min(num_queries, 100)
    for ids in ("step", "any_order"):
        check(ragged(device, rows=rows, num_queries=tokens, ids=ids, lengths="full", **heads), device)


@given(case=cases(has_draft_mask=False, dtype=torch.float64))
def test_the_formula_by_rows_is_the_promise(case: CacheCase) -> None:
    call = case.make()
    seen = [
        (row + first, slot)
        for first, _, of_row in row_calls(call)
        for row, _, slot in visible_pairs(of_row).nonzero().tolist()
    ]
    assert sorted(seen) == sorted((row, slot) for b, i, row in tokens(call) for slot in visible_slots(call, b, i))
    for found, exact in zip(rows_formula(call, torch.float64), attention(call), strict=True):
        torch.testing.assert_close(found, exact)
    for found, own in zip(
        rows_formula(call, torch.float32, torch.bfloat16), formula(call, torch.float32, torch.bfloat16), strict=True
    ):
        torch.testing.assert_close(found, own, atol=2e-2, rtol=2e-2)


# ---------------------------------------------------------------- on a GPU alone


FORWARD, FEW_QUERIES = "flash_attention_forward_kernel", "flash_attention_kv_cache_"


@pytest.mark.gpu
@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("num_queries", [67, 70, 128, 130, 200, 513])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_forward_kernel_takes_the_calls_here(dim: int, num_queries: int, pages: str) -> None:
    call = chunks("cuda", dim=dim, num_queries=num_queries, **PAGES[pages]).make("cuda")
    names = launches(lambda: flash(call))
    assert any(FORWARD in name for name in names), names
    assert not any(FEW_QUERIES in name for name in names), names


@pytest.mark.gpu
@pytest.mark.parametrize(
    "fields", [{"num_queries": 63}, {"split_keys": 64}, {"positions": "end"}, {"rows": 1, "num_heads": 4}]
)
def test_others_go_to_the_kernel_for_few_queries(fields: dict[str, Any]) -> None:
    call = chunks("cuda", **fields).make("cuda")
    names = launches(lambda: flash(call))
    assert any(FEW_QUERIES in name for name in names), names


@pytest.mark.gpu
@pytest.mark.parametrize(("ids", "has_chunks"), [("step", True), ("chunks", True), ("decode", False)])
@pytest.mark.parametrize("pages", ["dense", "pages16"])
def test_the_forward_kernel_takes_chunks_that_ids_name(pages: str, ids: str, has_chunks: bool) -> None:
    rows = {} if has_chunks else {"rows": 600, "num_queries": 600, "page_size": 16, "pages_per_row": 1}
    call = ragged("cuda", ids=ids, **PAGES[pages] | rows).make("cuda")
    names = launches(lambda: flash(call))
    assert any(FORWARD in name for name in names) == has_chunks, names
    assert any(FEW_QUERIES in name for name in names), names


@pytest.mark.gpu
@pytest.mark.parametrize("pages", ["dense", "pages16"])
def test_a_graph_is_replayed_with_other_ids(pages: str) -> None:
    calls = [
        ragged("cuda", seed=seed, ids=ids, **PAGES[pages]).make("cuda")
        for seed, ids in enumerate(("step", "chunks", "all_padding", "step"))
    ]
    for call, results in replays(flash, calls):
        check_results(call, *results, by_rows=True)


@pytest.mark.gpu
def test_chunks_that_ids_name_give_the_same_bits_every_time() -> None:
    call = ragged("cuda", dim=128, ids="any_order").make("cuda")
    first = flash(call)
    for _ in range(20):
        assert all(map(torch.equal, flash(call), first))


@pytest.mark.gpu
@pytest.mark.parametrize("pages", ["dense", "pages16", "pages128"])
@pytest.mark.parametrize("options", [{}, {"window_left": 100}, {"softcap": 20.0, "has_sinks": True}])
def test_a_graph_is_replayed_with_other_lengths_and_tables(options: dict[str, Any], pages: str) -> None:
    calls = [
        chunks("cuda", dim=128, seed=seed, lengths=kind, **options, **PAGES[pages]).make("cuda")
        for seed, kind in enumerate(("one", "mixed", "full", "zero", "edges"))
    ]
    for call, results in replays(flash, calls):
        check_results(call, *results, by_rows=True)


@pytest.mark.gpu
@pytest.mark.parametrize("pages", ["dense", "pages16"])
def test_a_call_gives_the_same_bits_every_time(pages: str) -> None:
    call = chunks("cuda", dim=128, **PAGES[pages]).make("cuda")
    first = flash(call)
    for _ in range(20):
        assert all(map(torch.equal, flash(call), first))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 48, 64, 256])
def test_pages_give_the_bits_of_dense_rows(page_size: int) -> None:
    paged = chunks("cuda", dim=128, page_size=page_size, pages_per_row=4, lengths="full").make("cuda")
    table = paged.pop("page_table").long()
    dense = paged | {name: paged[name][table].flatten(1, 2) for name in ("k_cache", "v_cache")}
    assert all(map(torch.equal, flash(paged | {"page_table": table}), flash(dense)))


OUT_OF_RANGE = {
    "lengths[1] = -1": "lengths must fit the cache",
    "lengths[1] = 65": "lengths must fit the cache",
    "page_table[1, 0] = 16": "the page table must name pages of the cache",
    "page_table[1, 3] = -1": "the page table must name pages of the cache",
}
OUT_OF_RANGE_WITH_IDS = OUT_OF_RANGE | {
    "ids[0, 5] = 4": "segment ids must name rows of the cache",
    "page_table[1, 0] = 2**40 + 1": "the page table must name pages of the cache",
}
CHANGES = [(False, *item) for item in OUT_OF_RANGE.items()] + [(True, *item) for item in OUT_OF_RANGE_WITH_IDS.items()]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("has_ids", "change", "message"), CHANGES)
def test_values_out_of_range_stop_the_device(has_ids: bool, change: str, message: str) -> None:
    program = f"""
import torch, selfattn
q = torch.randn(4, 100, 32, 64, device="cuda").bfloat16()
cache = torch.randn(16, 16, 4, 64, device="cuda").bfloat16()
lengths = torch.full((4,), 64, device="cuda")
page_table = torch.arange(16, device="cuda").view(4, 4)
ids = torch.arange(4, device="cuda").repeat_interleave(100)[None]
{change}
if {has_ids}:
    q = q.reshape(1, 400, 32, 64)
else:
    ids = None
selfattn.attention_with_kv_cache(q, cache, cache, lengths, page_table, segment_ids=ids, backend="flash")
torch.cuda.synchronize()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert message in run.stdout + run.stderr
