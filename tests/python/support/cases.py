"""Named problems that tests and benchmarks share, and the random id patterns of the property tests."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

BACKENDS_ON_CPU = ("reference", "aten", "flash", "auto")
BACKENDS_ON_GPU = (*BACKENDS_ON_CPU, "cudnn")
PLACES = [
    *(pytest.param("cpu", backend, id=f"cpu-{backend}") for backend in BACKENDS_ON_CPU),
    *(pytest.param("cuda", backend, id=f"cuda-{backend}", marks=pytest.mark.gpu) for backend in BACKENDS_ON_GPU),
]
"""(device, backend) of every backend on every device that it is meant for."""
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Allowed error of a result, as ``error`` measures it."""


@dataclass(frozen=True)
class Case:
    """One call of multihead_attention: shapes, and the options that are not defaults."""

    name: str
    batch: int = 2
    num_queries: int = 13
    num_keys: int = 13
    num_heads: int = 4
    num_kv_heads: int = 2
    dim: int = 16
    value_dim: int = 16
    ids: str | None = "packed"
    has_kv_ids: bool = False
    has_sinks: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """q, k, v and, where the case has them, segment_ids, kv_segment_ids and sinks."""

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(device, dtype)

        tensors = {
            "q": random(self.batch, self.num_queries, self.num_heads, self.dim),
            "k": random(self.batch, self.num_keys, self.num_kv_heads, self.dim),
            "v": random(self.batch, self.num_keys, self.num_kv_heads, self.value_dim),
        }
        if self.ids is not None:
            tensors["segment_ids"] = make_ids(self.ids, self.batch, self.num_queries).to(device)
        if self.has_kv_ids:
            tensors["kv_segment_ids"] = make_ids(self.ids, self.batch, self.num_keys).to(device)
        if self.has_sinks:
            tensors["sinks"] = random(self.num_heads)
        return tensors

    def with_(self, **changes) -> "Case":
        return replace(self, **changes)


def make_ids(kind: str, batch: int, length: int) -> Tensor:
    """Segment ids (batch, length) int32 of a kind that the semantics must serve."""
    if kind == "packed":  # documents side by side, padding at the end
        ids = torch.sort(torch.randint(0, 4, (batch, length)), dim=1).values
        ids[:, length - length // 6 :] = -1
    elif kind == "shuffled":  # the tokens of a document anywhere
        ids = torch.randint(0, 3, (batch, length))
    elif kind == "reused":  # runs 0 1 0 1: an id that comes back is the same document
        ids = (torch.arange(length) // 3 % 2).expand(batch, length)
    elif kind == "distinct":  # every document has one token
        ids = torch.arange(length).expand(batch, length)
    elif kind == "all_padding":
        ids = torch.full((batch, length), -1)
    elif kind == "mixed_padding":  # negative ids of several values, between the tokens
        ids = torch.randint(-3, 3, (batch, length))
    elif kind == "one_document":
        ids = torch.full((batch, length), 7)
    else:
        raise ValueError(kind)
    return ids.to(torch.int32).contiguous()


UNIT = 0.3
"""The random inputs are of size 1, and so are most results."""

ID_KINDS = ("packed", "shuffled", "reused", "distinct", "all_padding", "mixed_padding", "one_document")

CASES = [
    Case("dense_causal", ids=None),
    Case("dense_full", ids=None, options={"causal": False}),
    *(Case(f"ids_{kind}", ids=kind) for kind in ID_KINDS),
    Case("ids_full", ids="shuffled", options={"causal": False}),
    Case("queries_fewer_than_keys", num_queries=5, num_keys=12, ids=None),
    Case("queries_more_than_keys", num_queries=12, num_keys=5, ids=None),
    Case("own_ids_for_keys", num_queries=7, num_keys=13, ids="shuffled", has_kv_ids=True),
    Case(
        "own_ids_for_keys_full",
        num_queries=13,
        num_keys=6,
        ids="mixed_padding",
        has_kv_ids=True,
        options={"causal": False},
    ),
    Case("window_left", options={"window_left": 3}),
    Case("window_itself", options={"window_left": 0, "window_right": 0, "causal": False}),
    Case("window_both", ids="shuffled", options={"window_left": 4, "window_right": 2, "causal": False}),
    Case("window_fewer_queries", num_queries=5, num_keys=12, ids=None, options={"window_left": 2, "causal": False}),
    Case("softcap", options={"softcap": 1.5}),
    Case("sinks", has_sinks=True),
    Case("sinks_mixed_padding", ids="mixed_padding", has_sinks=True, options={"causal": False}),
    Case("scale", options={"qk_scale": 0.7}),
    Case("scale_zero", options={"qk_scale": 0.0}),
    Case("scale_negative", options={"qk_scale": -0.3}),
    Case("one_kv_head", num_kv_heads=1),
    Case("all_kv_heads", num_kv_heads=4),
    Case("value_dim_differs", dim=16, value_dim=8),
    Case("odd_dims", dim=5, value_dim=3, num_queries=9, num_keys=9),
    Case("one_token", num_queries=1, num_keys=1, ids="one_document"),
    Case(
        "longer_than_a_tile", batch=1, num_queries=150, num_keys=150, num_heads=2, num_kv_heads=1, dim=32, value_dim=32
    ),
    Case(
        "everything",
        num_queries=9,
        num_keys=14,
        ids="shuffled",
        has_kv_ids=True,
        has_sinks=True,
        value_dim=8,
        options={"window_left": 6, "window_right": 1, "causal": False, "softcap": 2.0, "qk_scale": 0.4},
    ),
]


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


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation, relative to the largest element of ``expected``, which counts as at least UNIT: a gradient
    that is exactly 0 comes out as the rounding of its terms. Infinite where NaN or infinities differ."""
    actual, expected = actual.detach().to("cpu", torch.float64), expected.detach().to("cpu", torch.float64)
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    finite = expected.isfinite()
    if not torch.equal(actual[~finite], expected[~finite]) or not actual[finite].isfinite().all():
        return float("inf")
    if not finite.any():
        return 0.0
    scale = max(expected[finite].abs().max().item(), UNIT)
    return (actual[finite] - expected[finite]).abs().max().item() / scale
