"""docs/semantics.md says who serves on CUDA what the kernels of ``flash`` do not: the serving table agrees, and so does
the memory that a call takes."""

import re

import pytest
import torch
from support import ROOT
from support.serving_table import MOST_TOKENS_WITH_IDS, Call, chosen, describe, serving

import selfattn

IDS = {"has_ids": True}
LONG = MOST_TOKENS_WITH_IDS + 1
ROWS: dict[str, list[dict]] = {
    "float64": [IDS | {"dtype": torch.float64}],
    "a head dimension above 256": [
        *(IDS | {"dim": dim, "value_dim": value_dim} for dim, value_dim in ((264, 264), (16, 257), (300, 7))),
        IDS | {"dtype": torch.float32, "dim": 257, "value_dim": 16},
    ],
    "compute capability below 8.0": [IDS | {"capability": (7, 5)}],
    "rows of more than 524,288 tokens with segment ids or positions": [
        {"has_ids": True, "num_queries": LONG, "num_keys": LONG},
        {"has_positions": True, "num_queries": LONG, "num_keys": LONG},
    ],
    "any of these with sinks, softcap or lse": [
        call | option
        for call in (IDS | {"dtype": torch.float64}, IDS | {"dim": 260})
        for option in ({"has_sinks": True}, {"softcap": 30.0}, {"wants_lse": True})
    ],
    "`torch.func` transforms but vmap, forward mode": [{"transform": "grad"}, {"has_tangent": True}],
}
"""By the first cell of a row of the document, calls that it is about."""
BY_KERNELS = [
    IDS,
    IDS | {"num_queries": 5, "num_keys": 9},
    IDS | {"has_sinks": True, "wants_lse": True, "window_left": 3},
    IDS | {"softcap": 30.0, "has_sinks": True, "wants_lse": True},
    {"num_queries": 5, "num_keys": 9, "window_right": 2, "causal": False},
    {"qk_scale": -0.3, "has_positions": True, "causal": False},
    {"num_queries": 5, "num_keys": 9, "has_positions": True, "window_left": 3},
    IDS | {"has_positions": True, "dtype": torch.float32, "softcap": 30.0, "has_sinks": True, "wants_lse": True},
    IDS | {"capability": (8, 6), "transform": "vmap"},
    IDS | {"dtype": torch.float32, "has_sinks": True, "wants_lse": True, "softcap": 30.0},
    IDS | {"dtype": torch.float32, "dim": 100, "value_dim": 12, "capability": (8, 6)},
    *(
        IDS
        | {
            "dtype": dtype,
            "dim": dim,
            "value_dim": value_dim,
            "capability": capability,
            "softcap": 30.0,
            "has_sinks": True,
        }
        for dtype in (torch.bfloat16, torch.float32)
        for dim, value_dim in ((100, 100), (16, 12), (5, 256), (255, 1))
        for capability in ((8, 0), (9, 0))
    ),
]


def rows_of_document() -> dict[str, str]:
    """First cell -> the backend in the second, where that names one."""
    text = (ROOT / "docs" / "semantics.md").read_text()
    table = text.partition("### What takes a dense mask on CUDA")[2].partition("## Errors")[0]
    return dict(re.findall(r"^\| (.+?) \| `(\w+)` \|", table, re.MULTILINE))


def test_document_and_serving_table_name_the_same_backend() -> None:
    rows = rows_of_document()
    assert rows.keys() == ROWS.keys()
    for name, calls in ROWS.items():
        for changes in calls:
            call = Call(device="cuda").with_(**changes)
            assert "flash" not in serving(call) and chosen(call) == rows[name], (name, call)


def test_everything_else_is_served_by_the_kernels() -> None:
    for changes in BY_KERNELS:
        assert chosen(Call(device="cuda").with_(**changes)) == "flash", changes


@pytest.mark.gpu
@pytest.mark.parametrize("has_own_key_ids", [False, True])
@pytest.mark.parametrize("options", [{}, {"window_left": 100}, {"causal": False}, {"softcap": 30.0}])
@pytest.mark.parametrize("dim", [64, 99])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_calls_with_ids_take_no_mask_where_the_kernels_serve(
    dtype: torch.dtype, dim: int, options: dict, has_own_key_ids: bool
) -> None:
    length = 4096
    q = torch.randn(1, length, 1, dim, device="cuda", dtype=dtype)
    ids = torch.randint(0, 9, (1, length), device="cuda", dtype=torch.int32)
    ids = {"segment_ids": ids} | ({"kv_segment_ids": ids.clone()} if has_own_key_ids else {})
    if chosen(describe(q, q, q, **ids, **options)) != "flash":
        pytest.skip("by the serving table flash does not serve this device")
    selfattn.multihead_attention(q, q, q, **ids, **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    selfattn.multihead_attention(q, q, q, **ids, **options)
    assert torch.cuda.max_memory_allocated() - before < length * length / 8  # a mask has a byte a pair
