"""Promise: tokens are written to the slots that they name, and nothing else is touched; norm and rotation before that
are those of qk_norm_rope."""

import math

import pytest
import torch
from support.kv_cache import LAYOUTS, lay_out
from torch import Tensor

import selfattn

ROWS, PAGE, PAGES, LENGTH, HEADS, DIM, VALUE_DIM = 3, 4, 3, 5, 2, 8, 6


def make(device: str, ids: str | None = None, layout: str = "nhd", dtype: torch.dtype = torch.float32) -> dict:
    """A call of append_kv_cache with caches full of NaN, and slots that are all different."""
    num_pages = ROWS * PAGES + 2
    caches = [torch.full((num_pages, PAGE, HEADS, dim), math.nan, dtype=dtype) for dim in (DIM, VALUE_DIM)]
    batch = ROWS if ids is None else 2
    positions = torch.stack([torch.randperm(PAGE * PAGES)[:LENGTH] for _ in range(batch)])
    call = {
        "k": torch.randn(batch, LENGTH, HEADS, DIM, dtype=dtype),
        "v": torch.randn(batch, LENGTH, HEADS, VALUE_DIM, dtype=dtype),
        "positions": positions.int(),
        "page_table": torch.randperm(num_pages)[: ROWS * PAGES].view(ROWS, PAGES),
    }
    if ids is not None:
        rows = {"padded": [[2, -1, 2, -1, 2], [0, 0, 0, -5, -1]], "padding": [[-1] * LENGTH] * 2}[ids]
        call["segment_ids"] = torch.tensor(rows)
        call["positions"][call["segment_ids"] < 0] = 10**6  # which nobody reads
    call = {name: tensor.to(device) for name, tensor in call.items()}
    caches = lay_out(*(cache.to(device) for cache in caches), layout)
    return call | dict(zip(("k_cache", "v_cache"), caches, strict=True))


def written(call: dict, tokens: Tensor, cache: Tensor) -> Tensor:
    """The cache after the call, in loops."""
    expected = cache.clone()
    for b in range(tokens.shape[0]):
        for i in range(tokens.shape[1]):
            row = b if call.get("segment_ids") is None else int(call["segment_ids"][b, i])
            if row >= 0:
                page, offset = divmod(int(call["positions"][b, i]), PAGE)
                expected[int(call["page_table"][row, page]), offset] = tokens[b, i]
    return expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ids", (None, "padded", "padding"))
def test_tokens_stand_at_their_slots(ids: str | None, layout: str, device: str) -> None:
    call = make(device, ids, layout)
    expected = [written(call, call[name], call[f"{name}_cache"]) for name in "kv"]
    selfattn.append_kv_cache(**call)
    for name, cache in zip("kv", expected, strict=True):
        torch.testing.assert_close(call[f"{name}_cache"], cache, rtol=0, atol=0, equal_nan=True)


def test_dense_rows(device: str) -> None:
    caches = [torch.zeros(2, 6, 1, 4, device=device) for _ in "kv"]
    k, v = torch.ones(2, 1, 1, 4, device=device), torch.full((2, 1, 1, 4), 2.0, device=device)
    selfattn.append_kv_cache(k, v, torch.tensor([[5], [0]], device=device), *caches)
    assert [int(cache.sum()) for cache in caches] == [8, 16]
    assert (caches[0][0, 5] == 1).all() and (caches[0][1, 0] == 1).all()


def test_no_tokens(device: str) -> None:
    call = make(device)
    for name in ("k", "v", "positions"):
        call[name] = call[name][:, :0]
    selfattn.append_kv_cache(**call)
    assert call["k_cache"].isnan().all()


@pytest.mark.parametrize(
    "options", [{}, {"pairing": "half", "theta": 100.0}, {"norm": False}, {"rope": False}], ids=str
)
@pytest.mark.parametrize("has_tables", (False, True))
@pytest.mark.parametrize("ids", (None, "padded"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_norm_and_rotation(dtype: torch.dtype, ids: str | None, has_tables: bool, options: dict, device: str) -> None:
    if has_tables and not options.get("rope", True):
        return
    call = make(device, ids, dtype=dtype)
    q = torch.randn(call["k"].shape[0], LENGTH, 2 * HEADS, DIM, device=device, dtype=dtype)
    if options.get("norm", True):
        options = options | {"q_weight": torch.rand(DIM, device=device), "k_weight": torch.rand(DIM, device=device)}
    if has_tables:
        sin, cos = selfattn.precompute_freqs(6, torch.randint(0, 50, (call["k"].shape[0], LENGTH), device=device))
        options = options | {"freqs_sin": sin, "freqs_cos": cos}
    rotation = {} if has_tables or not options.get("rope", True) else {"positions": call["positions"]}
    expected_q, expected_k = selfattn.qk_norm_rope(q, call["k"], **options, **rotation)
    expected = [written(call, expected_k, call["k_cache"]), written(call, call["v"], call["v_cache"])]
    assert torch.equal(selfattn.qk_norm_rope_append(q, **call, **options), expected_q)
    for name, cache in zip("kv", expected, strict=True):
        torch.testing.assert_close(call[f"{name}_cache"], cache, rtol=0, atol=0, equal_nan=True)


def test_slots_of_tokens(device: str) -> None:
    lengths = torch.tensor([4, 0, 9], device=device, dtype=torch.int32)
    positions = selfattn.kv_cache_positions(lengths, None, 2, 12)
    assert positions.tolist() == [[2, 3], [-2, -1], [7, 8]]
    ids = torch.tensor([[2, 0, 2, -1], [-3, 0, 2, 0]], device=device)
    assert selfattn.kv_cache_positions(lengths, ids, 4, 12).tolist() == [[6, 1, 7, -1], [-1, 2, 8, 3]]
    given = torch.arange(8, device=device).view(2, 4)
    assert selfattn.kv_cache_positions(lengths, ids, 4, 12, given).tolist() == [[0, 1, 2, -1], [-1, 5, 6, 7]]
    after = selfattn.lengths_after_append(lengths, ids, 4)
    assert after.tolist() == [7, 0, 12] and after.dtype == lengths.dtype
    assert selfattn.lengths_after_append(lengths, None, 3).tolist() == [7, 3, 12]


def test_autocast_casts_tokens_to_the_cache(device: str) -> None:
    call = make(device, dtype=torch.float16) | {"k": torch.randn(ROWS, LENGTH, HEADS, DIM, device=device)}
    expected = written(call, call["k"].half(), call["k_cache"])
    with torch.autocast(device, torch.bfloat16):
        selfattn.append_kv_cache(**call)
        q = selfattn.qk_norm_rope_append(
            torch.randn(ROWS, LENGTH, HEADS, DIM, device=device), **call, norm=False, rope=False
        )
        out = selfattn.attention_with_kv_cache(
            torch.randn(ROWS, 1, HEADS, DIM, device=device),
            call["k_cache"].nan_to_num(),
            call["v_cache"].nan_to_num(),
            torch.tensor([1, 2, 3], device=device),
            call["page_table"],
        )
    assert q.dtype == out.dtype == torch.float16
    torch.testing.assert_close(call["k_cache"], expected, rtol=0, atol=0, equal_nan=True)
