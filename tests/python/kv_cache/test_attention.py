"""Promise: attention over a cache is the formula over the slots that each query may see, whatever stands elsewhere.

Slots that nobody sees hold NaN, and entries of the table that nobody reads name pages that are not there.
"""

import pytest
import torch
from hypothesis import given
from support.kv_cache import LAYOUTS, CacheCase, cases, check_results
from support.problems import error
from support.serving_table import serves_cache

import selfattn

BACKENDS = ("reference", "aten", "flash", "auto")
CASES = {
    "decode": CacheCase(),
    "dense": CacheCase(table=None),
    "drafts": CacheCase(num_queries=4),
    "tree": CacheCase(num_queries=5, has_draft_mask=True),
    "tree_not_causal": CacheCase(num_queries=5, has_draft_mask=True, causal=False, window_left=6),
    "window_begins_in_tree": CacheCase(num_queries=8, has_draft_mask=True, lengths="full", window_left=2),
    "tree_fills_row": CacheCase(num_queries=8, has_draft_mask=True, lengths="full", page_size=4, pages_per_row=2),
    "ragged": CacheCase(num_queries=9, ids="chunks", lengths="full"),
    "padded": CacheCase(num_queries=9, ids="padded"),
    "any_order": CacheCase(num_queries=9, ids="any_order", index_dtype=torch.int64),
    "positions": CacheCase(num_queries=3, positions="any", window_left=2, window_right=1, causal=False),
    "shared": CacheCase(table="shared", lengths="full", pages_per_row=4),
    "ring": CacheCase(table="ring", lengths="full", pages_per_row=5, window_left=6),
    "edges": CacheCase(rows=8, lengths="edges", page_size=16, window_left=16),
    "empty": CacheCase(lengths="zero", has_sinks=True),
    "queries_longer_than_rows": CacheCase(num_queries=6, lengths="one", causal=False),
    "everything": CacheCase(
        num_queries=3, table="ring", has_sinks=True, softcap=1.5, qk_scale=0.3, window_left=5, value_dim=4
    ),
    "splits": CacheCase(page_size=64, lengths="mixed", split_keys=64),
    "multi_query": CacheCase(num_kv_heads=1, num_heads=6, num_queries=2),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(case: CacheCase, device: str, backend: str) -> None:
    call = case.make(device)
    if serves_cache(backend, call):
        check_results(call, selfattn.attention_with_kv_cache(**call, backend=backend))
    else:
        with pytest.raises(NotImplementedError, match=f"^selfattn: backend '{backend}' cannot serve this call: "):
            selfattn.attention_with_kv_cache(**call, backend=backend)
    if serves_cache(backend, call, wants_lse=True):
        check_results(call, *selfattn.attention_with_kv_cache_lse(**call, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_named_calls(case: CacheCase, backend: str, device: str) -> None:
    check(case, device, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend: str, dtype: torch.dtype, device: str) -> None:
    check(CacheCase(num_queries=2, dtype=dtype), device, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str, layout: str, device: str) -> None:
    check(CacheCase(layout=layout, num_queries=2), device, backend)


@pytest.mark.parametrize("backend", ("reference", "aten", "auto"))
@given(case=cases())
def test_random_calls(backend: str, case: CacheCase) -> None:
    check(case, "cpu", backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("reference", "aten", "auto"))
@given(case=cases())
def test_random_calls_on_cuda(backend: str, case: CacheCase) -> None:
    check(case, "cuda", backend)


def test_expanded_lengths(device: str) -> None:
    """One number for every row, of stride 0."""
    call = CacheCase(lengths="full", table=None).make(device)
    full = selfattn.attention_with_kv_cache(**call)
    call["lengths"] = torch.tensor([12], device=device).expand(3)
    assert torch.equal(selfattn.attention_with_kv_cache(**call), full)


@pytest.mark.parametrize("backend", ("reference", "auto"))
def test_a_query_is_isolated_from_what_others_see(backend: str, device: str) -> None:
    """NaN in the causal future, before the window and in other rows, where another query does see it."""
    case = CacheCase(num_queries=3, lengths="full", window_left=2, has_sinks=True)
    call = case.make(device)
    expected = selfattn.attention_with_kv_cache(**call, backend=backend)
    for row in range(case.rows):
        spoilt = {name: call[name].clone() for name in ("k_cache", "v_cache")}
        last = (int(call["page_table"][row, -1]), case.page_size - 1)
        for cache in spoilt.values():
            cache[last] = float("nan")  # the last slot: of the last query alone
        out = selfattn.attention_with_kv_cache(**(call | spoilt), backend=backend)
        assert torch.equal(out[:row], expected[:row]) and torch.equal(out[row + 1 :], expected[row + 1 :])
        assert torch.equal(out[row, :2], expected[row, :2])
        assert out[row, 2].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_of_a_row_equal_one_page(backend: str, device: str) -> None:
    paged = CacheCase(num_queries=2, lengths="full", table="ordered").make(device)
    if not serves_cache(backend, paged):
        return
    dense = {name: paged[name].reshape(3, 12, *paged[name].shape[2:]) for name in ("k_cache", "v_cache")}
    outs = [
        selfattn.attention_with_kv_cache(**call, backend=backend)
        for call in (paged, {**paged, **dense, "page_table": None})
    ]
    assert error(*outs) < 1e-6


def test_a_prefix_merges_with_the_rest(device: str) -> None:
    """Cascade: all rows see a shared prefix, each its own rest; the parts are merged by their lse."""
    call = CacheCase(rows=2, lengths="full", table="shared", pages_per_row=4, page_size=4).make(device)
    table = call["page_table"]
    whole = selfattn.attention_with_kv_cache(**call)
    caches = {name: call[name] for name in ("k_cache", "v_cache")}
    lengths = torch.tensor([8, 8], device=device)
    prefix = selfattn.attention_with_kv_cache_lse(
        call["q"].transpose(0, 1), **caches, lengths=lengths[:1], page_table=table[:1, :2], causal=False
    )
    rest = selfattn.attention_with_kv_cache_lse(call["q"], **caches, lengths=lengths, page_table=table[:, 2:])
    out, _ = selfattn.merge_attention(
        prefix[0].transpose(0, 1).contiguous(), prefix[1].permute(2, 1, 0).contiguous(), *rest
    )
    assert error(out, whole) < 1e-6
