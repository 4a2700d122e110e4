"""The named calls that every backend is tested with, and the random id patterns of the property tests."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from support.problems import Case

BACKENDS_ON_CPU = ("reference", "aten", "flash", "auto")
BACKENDS_ON_GPU = (*BACKENDS_ON_CPU, "cudnn")
PLACES = [
    *(pytest.param("cpu", backend, id=f"cpu-{backend}") for backend in BACKENDS_ON_CPU),
    *(pytest.param("cuda", backend, id=f"cuda-{backend}", marks=pytest.mark.gpu) for backend in BACKENDS_ON_GPU),
]
"""(device, backend) of every backend on every device that it is meant for."""
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Allowed error of a result, as ``error`` measures it."""
ID_KINDS = ("packed", "shuffled", "reused", "distinct", "all_padding", "mixed_padding", "one_document")

CASES = [
    Case("dense_causal", ids=None),
    Case("dense_full", ids=None, causal=False),
    *(Case(f"ids_{kind}", ids=kind) for kind in ID_KINDS),
    Case("ids_full", ids="shuffled", causal=False),
    Case("queries_fewer_than_keys", num_queries=5, num_keys=12, ids=None),
    Case("queries_more_than_keys", num_queries=12, num_keys=5, ids=None),
    Case("own_ids_for_keys", num_queries=7, num_keys=13, ids="shuffled", has_kv_ids=True),
    Case("ids_named", ids="named_padding", num_queries=23),
    Case("own_named_ids_for_keys", num_queries=19, num_keys=31, ids="named", has_kv_ids=True),
    Case("own_ids_for_keys_full", num_keys=6, ids="mixed_padding", has_kv_ids=True, causal=False),
    Case("window_left", window_left=3),
    Case("window_itself", window_left=0, window_right=0, causal=False),
    Case("window_both", ids="shuffled", window_left=4, window_right=2, causal=False),
    Case("window_fewer_queries", num_queries=5, num_keys=12, ids=None, window_left=2, causal=False),
    Case("softcap", softcap=1.5),
    Case("sinks", has_sinks=True),
    Case("sinks_mixed_padding", ids="mixed_padding", has_sinks=True, causal=False),
    Case("scale", qk_scale=0.7),
    Case("scale_zero", qk_scale=0.0),
    Case("scale_negative", qk_scale=-0.3),
    Case("one_kv_head", num_kv_heads=1),
    Case("all_kv_heads", num_kv_heads=4),
    Case("value_dim_differs", value_dim=8),
    Case("odd_dims", dim=5, value_dim=3, num_queries=9),
    Case("one_token", num_queries=1, ids="one_document"),
    Case("positions_index", num_queries=5, num_keys=12, ids=None, positions="index"),
    Case("positions_zigzag", ids=None, positions="zigzag", window_left=3),
    Case("positions_gathered", num_queries=6, num_keys=14, ids="shuffled", has_kv_ids=True, positions="gathered"),
    Case("positions_restarting", ids="packed", positions="restarting"),
    Case("positions_cache", num_queries=3, num_keys=14, ids=None, positions="cache", window_left=6),
    Case("positions_any", ids="mixed_padding", positions="any"),
    Case("positions_any_window", ids="shuffled", positions="any", causal=False, window_left=2, window_right=1),
    Case("positions_extreme", ids=None, positions="extreme", causal=False, window_left=2, has_sinks=True),
    Case("positions_extreme_in_order", num_queries=9, num_keys=13, ids=None, positions="extreme_in_order"),
    Case("positions_future", positions="future", ids=None),
    Case("positions_alike", positions="alike", ids="shuffled"),
    Case("positions_unread", positions="any", ids="packed", causal=False),
    Case("positions_longer_than_a_tile", num_queries=150, num_heads=2, num_kv_heads=1, ids=None, positions="zigzag"),
    Case("longer_than_a_tile", batch=1, num_queries=150, num_heads=2, num_kv_heads=1, dim=32),
    Case(
        "everything",
        num_queries=9,
        num_keys=14,
        value_dim=8,
        ids="shuffled",
        has_kv_ids=True,
        has_sinks=True,
        causal=False,
        qk_scale=0.4,
        window_left=6,
        window_right=1,
        softcap=2.0,
    ),
    Case(
        "everything_and_positions",
        num_queries=9,
        num_keys=14,
        value_dim=8,
        ids="shuffled",
        has_kv_ids=True,
        positions="permuted",
        has_sinks=True,
        qk_scale=0.4,
        window_left=9,
        softcap=2.0,
    ),
]


UNALIGNED_DIMS = (1, 3, 7, 9, 31, 33, 63, 65, 99, 100, 101, 127, 129, 255)
"""Head dimensions that are no multiple of 16 bytes, in bfloat16 and float16 and (but 100) in float32."""
UNALIGNED_PAIRS = (
    (5, 256),
    (256, 5),
    (33, 99),
    (99, 64),
    (64, 99),
    (100, 8),
    (127, 65),
    (250, 200),
    (200, 250),
    (3, 1),
)
"""DQK and DV."""
UNALIGNED_LAYOUTS = ("bnsd", "padded", "odd", "surrounded", "surrounded_bnsd")


@dataclass(frozen=True)
class CudaCase(Case):
    """As CUDA's kernels are tested: rows of a few tiles."""

    num_queries: int = 300
    dim: int = 128
    ids: str | None = None
    dtype: torch.dtype = torch.bfloat16
    spread: float = 1.5


def long(num_queries: int = 2700, num_keys: int = 0, **fields: Any) -> CudaCase:
    """Queries that see many keys are worked on by another form of the backward kernels than those that see few."""
    return CudaCase(**{"batch": 1, "num_queries": num_queries, "num_keys": num_keys, **fields})


@st.composite
def segment_ids(draw: st.DrawFn, max_length: int = 24) -> Tensor:
    """(B, S) ids of every kind: random values, reused ids, documents of one token, padding anywhere, nothing else."""
    batch = draw(st.integers(1, 3))
    length = draw(st.integers(1, max_length))
    row = st.one_of(
        st.lists(st.integers(-2, 3), min_size=length, max_size=length),
        st.just(list(range(length))),
        st.just([-1] * length),
        st.lists(st.sampled_from([0, 2**31 - 1, -(2**31)]), min_size=length, max_size=length),
        st.lists(st.integers(1, length), min_size=1, max_size=length).map(
            lambda lengths: [document for document, n in enumerate(lengths) for _ in range(n)][:length]
        ).map(lambda ids: ids + [-1] * (length - len(ids))),
    )  # fmt: skip
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return torch.tensor([draw(row) for _ in range(batch)], dtype=dtype)
