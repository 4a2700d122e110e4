"""A window of any size is a window: one larger than every row is none."""

import sys

import pytest
import torch
from support.cases import PLACES
from support.problems import error, make_ids
from support.serving_table import describe, skip_refused

import selfattn

HUGE = [sys.maxsize, sys.maxsize - 1, sys.maxsize // 2 + 1, 2**62, 2**53 + 1, 2**32, 2**31, 2**31 - 1]


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize("side", ["window_left", "window_right"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(9, 9), (4, 9), (9, 4)])
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_huge_window_is_none(
    device: str, backend: str, num_queries: int, num_keys: int, causal: bool, side: str, size: int
) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q = torch.randn(2, num_queries, 2, 16, device=device, dtype=dtype)
    k, v = (torch.randn(2, num_keys, 2, 16, device=device, dtype=dtype) for _ in range(2))
    ids, kv_ids = (make_ids("shuffled", 2, length).to(device) for length in (num_queries, num_keys))

    def run(**window: int) -> torch.Tensor:
        return selfattn.multihead_attention(q, k, v, ids, causal, backend=backend, kv_segment_ids=kv_ids, **window)

    try:
        expected = run()
    except NotImplementedError as refusal:
        skip_refused(refusal, backend, describe(q, k, v, ids, causal))
    assert error(run(**{side: size}), expected) < (2e-6 if dtype == torch.float32 else 1.6e-2)
