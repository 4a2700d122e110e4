"""On the CPU, infinite sinks and logits give what their limit says, forward and backward."""

import math

import pytest
import torch
from torch import Tensor

import selfattn  # noqa: F401  (registers the operators)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
LENGTHS = pytest.mark.parametrize("num_keys", [30, 1500])  # as one part, and split over keys


def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **options) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    torch.manual_seed(1)
    out, lse = torch.ops.selfattn.flash_attention(q, k, v, **options, sinks=sinks)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.ops.selfattn.flash_attention_backward(grad_out, grad_lse, q, k, v, out, lse, **options)
    return [out, lse, *grads]


def make_tensors(num_keys: int, dtype: torch.dtype, heads: int = 2) -> list[Tensor]:
    return [torch.randn(1, length, heads, 16).to(dtype) for length in (30, num_keys, num_keys)]


@DTYPES
@LENGTHS
@pytest.mark.parametrize("causal", [True, False])
def test_sink_of_minus_infinity_is_no_sink(dtype: torch.dtype, num_keys: int, causal: bool) -> None:
    tensors = make_tensors(num_keys, dtype)
    ids = torch.arange(num_keys)[None].int() // 10 - 1  # padding first
    options = {"causal": causal, "segment_ids": ids[:, :30].contiguous(), "kv_segment_ids": ids}
    with_sinks = run(*tensors, torch.full((2,), -math.inf), **options)
    for actual, expected in zip(with_sinks, run(*tensors, **options), strict=True):
        assert torch.equal(actual, expected)
    assert (with_sinks[1][..., :10] == -math.inf).all()


@DTYPES
@LENGTHS
def test_sink_of_infinity_takes_all_weight(dtype: torch.dtype, num_keys: int) -> None:
    tensors = make_tensors(num_keys, dtype)
    sinks = torch.tensor([math.inf, 0.5])
    out, lse, dq, dk, dv = run(*tensors, sinks)
    assert (lse[:, 0] == math.inf).all()
    for result in (out, dq, dk, dv):
        assert (result[:, :, 0] == 0).all()
    finite = run(*tensors, torch.full((2,), 0.5))
    for actual, expected in zip((out, dq, dk, dv), (finite[0], *finite[2:]), strict=True):
        assert torch.equal(actual[:, :, 1], expected[:, :, 1])


@DTYPES
@LENGTHS
@pytest.mark.parametrize("sink", [None, 0.75])
def test_row_of_logits_of_minus_infinity_is_a_row_without_keys(
    dtype: torch.dtype, num_keys: int, sink: float | None
) -> None:
    q, k, v = make_tensors(num_keys, dtype, heads=1)
    k = k.abs()
    q[0, 7] = -math.inf
    out, lse, dq, dk, dv = run(q, k, v, None if sink is None else torch.tensor([sink]), causal=False)
    assert (out[0, 7] == 0).all() and (dq[0, 7] == 0).all()
    assert lse[0, 0, 7] == (-math.inf if sink is None else sink)
    assert all(result.isfinite().all() for result in (out, dq, dv))
    if sink is None:
        assert dk.isfinite().all()


@DTYPES
@LENGTHS
def test_logit_of_infinity_is_nan_in_its_row_alone(dtype: torch.dtype, num_keys: int) -> None:
    q, k, v = make_tensors(num_keys, dtype, heads=1)
    q[0, 7, 0, 0], k[0, :, 0, 0] = math.inf, k[0, :, 0, 0].abs()
    clean = run(torch.where(q.isinf(), 0.0, q), k, v, causal=False)
    out, lse, dq, *_ = run(q, k, v, causal=False)
    others = [row for row in range(30) if row != 7]
    assert out[0, 7].isnan().all() and not lse[0, 0, 7].isfinite() and dq[0, 7].isnan().all()
    assert torch.equal(out[0, others], clean[0][0, others]) and torch.equal(dq[0, others], clean[2][0, others])


@LENGTHS
def test_nan_in_every_part_is_not_hidden(num_keys: int) -> None:
    q, k, v = make_tensors(num_keys, torch.float32, heads=1)
    q[0, 7] = math.nan
    out, lse, *_ = run(q, k, v, causal=False)
    assert out[0, 7].isnan().all() and lse[0, 0, 7].isnan()
