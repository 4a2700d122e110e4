"""Promise: the CPU kernels over a KV cache give the formula's results, for every kind of call, however work is split.

The rows are longer than what the kernels take at once (64 keys, 64 query rows, chunks of 256 keys).
"""

import math

import pytest
import torch
from hypothesis import given
from support.kv_cache import LAYOUTS, CacheCase, cases, check_results
from torch import Tensor

import selfattn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONG = CacheCase(rows=2, page_size=16, pages_per_row=24, lengths="full", dim=32)
CASES = {
    "decode": LONG,
    "mixed_lengths": LONG.with_(rows=5, lengths="mixed"),
    "page_edges": LONG.with_(rows=6, lengths="edges", pages_per_row=5),
    "dense": LONG.with_(table=None, lengths="mixed"),
    "int64": LONG.with_(index_dtype=torch.int64, lengths="mixed"),
    "drafts": LONG.with_(num_queries=4),
    "tree": LONG.with_(num_queries=7, has_draft_mask=True),
    "window_begins_in_tree": LONG.with_(num_queries=7, has_draft_mask=True, window_left=2),
    "tree_across_spans": LONG.with_(num_queries=31, pages_per_row=5, has_draft_mask=True, window_left=40),
    "window": LONG.with_(num_queries=3, window_left=100, window_right=0, causal=False),
    "narrow_window": LONG.with_(window_left=3),
    "softcap": LONG.with_(softcap=1.5, num_queries=2),
    "negative_scale": LONG.with_(qk_scale=-0.3),
    "sinks": LONG.with_(has_sinks=True, lengths="mixed"),
    "ragged": LONG.with_(num_queries=11, ids="chunks"),
    "any_order": LONG.with_(num_queries=9, ids="any_order", lengths="mixed"),
    "padded": LONG.with_(num_queries=9, ids="padded"),
    "positions": LONG.with_(num_queries=5, positions="any", causal=False, window_left=90, window_right=70),
    "ring": LONG.with_(table="ring", window_left=20),
    "one_head_a_group": LONG.with_(num_heads=2),
    "three_heads_a_group": LONG.with_(num_heads=6),
    "multi_query": LONG.with_(num_heads=9, num_kv_heads=1, num_queries=2),
    "more_rows_than_a_tile": LONG.with_(num_heads=80, num_kv_heads=1, split_keys=64, rows=1),
    "odd_dimensions": LONG.with_(dim=41, value_dim=37, num_queries=2),
    "wide_values": LONG.with_(dim=16, value_dim=80),
    "dimension_256": LONG.with_(dim=256, pages_per_row=5),
    "splits": LONG.with_(split_keys=128, num_queries=2),
    # Runs of so many queries go through flash_attention.
    "long_run": LONG.with_(num_queries=40),
    "long_run_of_a_page": LONG.with_(num_queries=20, table=None, lengths="mixed"),
    "long_runs_beside_short": LONG.with_(rows=3, num_queries=45, ids="chunks"),
    "long_runs_in_any_order": LONG.with_(num_queries=30, ids="any_order"),
    "long_run_with_window": LONG.with_(num_queries=30, window_left=70, has_sinks=True, softcap=2.0),
    "long_run_with_both_windows": LONG.with_(num_queries=30, window_left=10, window_right=5, causal=False),
    "long_run_of_more_queries_than_keys": LONG.with_(num_queries=30, lengths="one", causal=False),
}


def flash(call: dict, **options: object) -> tuple[Tensor, Tensor]:
    return selfattn.attention_with_kv_cache_lse(**(call | options), backend="flash")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_named_calls(case: CacheCase, dtype: torch.dtype) -> None:
    call = case.with_(dtype=dtype).make()
    check_results(call, *flash(call))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_queries", [1, 20])
def test_strides(layout: str, num_queries: int) -> None:
    call = LONG.with_(layout=layout, num_queries=num_queries, lengths="mixed").make()
    check_results(call, *flash(call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=cases())
def test_random_calls(case: CacheCase, dtype: torch.dtype) -> None:
    call = case.with_(dtype=dtype).make()
    check_results(call, *flash(call))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ["decode", "mixed_lengths", "ragged", "sinks", "long_run"])
def test_any_number_of_threads(name: str, threads: int) -> None:
    call = CASES[name].make()
    torch.set_num_threads(threads)
    check_results(call, *flash(call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["decode", "drafts", "tree", "window", "sinks", "long_run"])
def test_fixed_splits_are_bitwise_equal(name: str, dtype: torch.dtype) -> None:
    """On any number of threads, and for a row alone as in a batch."""
    case = CASES[name].with_(dtype=dtype, rows=4, split_keys=64, table=None, lengths="mixed")
    call = case.make()
    torch.set_num_threads(1)
    expected = flash(call)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for result, first in zip(flash(call), expected, strict=True):
            assert torch.equal(result, first)
    for row in range(case.rows):
        alone = {
            key: value[row : row + 1] if isinstance(value, Tensor) and key != "sinks" else value
            for key, value in call.items()
        }
        for result, first in zip(flash(alone), expected, strict=True):
            assert torch.equal(result, first[row : row + 1])


def test_fixed_splits_of_pages_and_ids_are_bitwise_those_of_a_dense_row() -> None:
    case = LONG.with_(table="ordered", num_queries=3, split_keys=128)
    paged = case.make()
    expected = flash(paged)
    dense = {name: paged[name].reshape(2, 384, *paged[name].shape[2:]) for name in ("k_cache", "v_cache")}
    for result, first in zip(flash(paged | dense, page_table=None), expected, strict=True):
        assert torch.equal(result, first)
    ids = torch.arange(2, dtype=torch.int32).repeat_interleave(3)[None]
    out, lse = flash(paged, q=paged["q"].flatten(0, 1)[None], segment_ids=ids)
    assert torch.equal(out.view_as(expected[0]), expected[0])
    assert torch.equal(lse.view(4, 2, 3).transpose(0, 1), expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spoiler", [math.nan, math.inf])
@pytest.mark.parametrize("num_queries", [4, 24])
def test_a_query_is_isolated_from_what_others_see(num_queries: int, spoiler: float, dtype: torch.dtype) -> None:
    """A slot that is in one query's future and before another one's window, and of another row."""
    case = LONG.with_(num_queries=num_queries, window_left=num_queries // 2, table=None, dtype=dtype)
    call = case.make()
    expected = flash(call)
    slot = case.capacity - num_queries // 2
    sees_slot = [0 <= case.capacity - num_queries + i - slot <= num_queries // 2 for i in range(num_queries)]
    assert True in sees_slot and False in sees_slot
    others = torch.tensor(sees_slot).logical_not()
    for name in ("k_cache", "v_cache"):
        spoilt = call[name].clone()
        spoilt[1, slot] = spoiler
        out, lse = flash(call, **{name: spoilt})
        assert torch.equal(out[0], expected[0][0]) and torch.equal(lse[0], expected[1][0])
        assert torch.equal(out[1, others], expected[0][1, others])
        assert torch.equal(lse[1][:, others], expected[1][1][:, others])
        assert not out[1, others.logical_not()].isfinite().all()


def test_drafts_are_isolated_from_each_other() -> None:
    call = LONG.with_(num_queries=5, table=None).make()
    mask = torch.eye(5, dtype=torch.bool).expand(2, 5, 5)
    expected, _ = flash(call, draft_mask=mask)
    spoilt = call["v_cache"].clone()
    spoilt[:, -3] = math.nan  # seen by query 2 alone
    out, _ = flash(call, draft_mask=mask, v_cache=spoilt)
    seen = torch.arange(5) == 2
    assert torch.equal(out[:, ~seen], expected[:, ~seen])
    assert out[:, seen].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_stay_finite(dtype: torch.dtype) -> None:
    call = LONG.with_(dtype=dtype, qk_scale=1000.0, num_queries=2).make()
    out, lse = flash(call)
    assert out.isfinite().all() and lse.isfinite().all()
    check_results(call, out)


def test_the_call_is_served_under_auto() -> None:
    assert selfattn.explain_kv_cache_backend(**LONG.make()).startswith("flash: chosen")


def test_gradients_are_refused() -> None:
    call = LONG.make()
    call["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="not differentiable"):
        flash(call)
