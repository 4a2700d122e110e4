"""Infinite sinks and logits: -inf counts for nothing, a sink of +inf takes all the weight, NaN never leaves its row."""

import math

import pytest
import torch
from support import reference
from support.cases import PLACES, ROUNDING
from support.problems import Case, error
from support.serving_table import describe, skip_refused
from torch import Tensor

import selfattn

INF = math.inf
SINKS = {
    "none_in_effect": (-INF, -INF, -INF, -INF),
    "some_of_minus_infinity": (-INF, 0.3, -2.0, -INF),
    "some_of_plus_infinity": (INF, 0.3, -2.0, INF),
    "of_both": (0.5, -INF, INF, 3.0),
}
CALLS = [
    Case("padding", ids="mixed_padding"),
    Case("padding_full", ids="mixed_padding", causal=False),
    Case("nothing_but_padding", ids="all_padding"),
    Case("dense", ids=None),
    Case("more_queries", num_keys=5, ids=None),
    Case("softcap", ids="packed", softcap=1.5),
    Case("window", ids="shuffled", window_left=2, window_right=1, causal=False),
]
GRADIENT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=name_of)
@pytest.mark.parametrize("sinks", SINKS.values(), ids=SINKS)
@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("case", CALLS, ids=str)
def test_infinite_sinks_equal_the_oracle(
    case: Case, device: str, backend: str, sinks: tuple[float, ...], dtype: torch.dtype
) -> None:
    tensors = case.tensors(dtype, device)
    tensors["sinks"] = torch.tensor(sinks).to(device, dtype)
    leaves = [tensors[name].requires_grad_() for name in ("q", "k", "v", "sinks")]
    try:
        out, lse = selfattn.multihead_attention_lse(**tensors, **case.options, backend=backend)
    except NotImplementedError as refusal:
        skip_refused(refusal, backend, describe(**tensors, **case.options, wants_lse=True))
    expected, expected_lse = reference.attention(**tensors, **case.options)
    assert error(out, expected) < ROUNDING[dtype]
    assert error(lse, expected_lse) < max(ROUNDING[dtype], 1e-6)

    # A gradient of an lse of -inf goes nowhere, whatever it is; that of an lse of +inf is the sink's.
    grad_out, grad_lse = torch.randn(out.shape).to(dtype), torch.randn(lse.shape)
    actual = torch.autograd.grad((out, lse), leaves, (grad_out.to(device), grad_lse.to(device)))
    oracle = torch.autograd.grad(
        (expected, expected_lse), leaves, (grad_out.double(), grad_lse.double()), allow_unused=True
    )
    for gradient, wanted, leaf in zip(actual, oracle, leaves, strict=True):
        assert error(gradient, torch.zeros_like(leaf) if wanted is None else wanted) < GRADIENT_TOLERANCE[dtype]
    assert (actual[3][tensors["sinks"] == -INF] == 0).all()
    for head, sink in enumerate(sinks):
        if sink == INF:
            assert (out[:, :, head] == 0).all() and (lse[:, head] == INF).all()
            assert error(actual[3][head], grad_lse[:, head].double().sum()) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("sink", [-INF, INF])
def test_layer_with_an_infinite_sink_has_no_nan(qk_norm: bool, sink: float, device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = selfattn.SelfAttentionConfig(head_dim=16, qk_norm=qk_norm, num_kv_heads=2, sinks=True)
    module = selfattn.SelfAttention(64, config).to(device, dtype)
    with torch.no_grad():
        module.sinks[1] = sink
    x = torch.randn(2, 9, 64, device=device, dtype=dtype, requires_grad=True)
    ids = torch.tensor([[0, 0, -1, 1, 1, 1, -1, 0, -1]], device=device).expand(2, 9)
    module(x, segment_ids=ids).square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, *module.parameters()))
    assert module.sinks.grad[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_gradient_of_half_precision_sinks_is_summed_in_float32(device: str, backend: str, dtype: torch.dtype) -> None:
    # Every row adds a little of one sign: a sum in half precision would stop growing long before the last.
    length = 1500
    q, k, v = (torch.randn(2, length, 2, 16).div(4).to(device, dtype) for _ in range(3))
    ids = torch.arange(length, device=device).div(7, rounding_mode="floor").expand(2, length)
    sinks = torch.tensor([0.5, -0.5]).to(device, dtype).requires_grad_()
    wide = sinks.detach().double().requires_grad_()
    try:
        _, lse = selfattn.multihead_attention_lse(q, k, v, ids, sinks=sinks, backend=backend)
    except NotImplementedError as refusal:
        skip_refused(refusal, backend, describe(q, k, v, ids, sinks=sinks, wants_lse=True))
    _, expected = selfattn.multihead_attention_lse(
        q.double(), k.double(), v.double(), ids, sinks=wide, backend="reference"
    )
    (gradient,) = torch.autograd.grad(lse.sum(), sinks)
    (oracle,) = torch.autograd.grad(expected.sum(), wide)
    assert gradient.dtype == dtype
    assert error(gradient, oracle) < 2 * torch.finfo(dtype).eps


def overflowing(dtype: torch.dtype, device: str, sign: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, ids: document 1 is all of logits that overflow to an infinity of that sign, in finite values."""
    large = 1e200 if dtype == torch.float64 else 1e30
    q, k, v = (torch.randn(2, 12, heads, 16).to(device, dtype) for heads in (4, 2, 2))
    ids = torch.tensor([0, 0, 1, 1, 2, 1, 2, 0, -1, 1, 2, 0], device=device).expand(2, 12)
    document = (ids == 1)[..., None, None]
    return q.masked_fill(document, large), k.masked_fill(document, sign * large), v, ids


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_row_of_logits_of_minus_infinity_is_a_row_without_keys(
    device: str, backend: str, has_sinks: bool, dtype: torch.dtype
) -> None:
    q, k, v, ids = overflowing(dtype, device, sign=-1.0)
    sinks = torch.randn(4).to(device, dtype) if has_sinks else None
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, sinks) if tensor is not None]
    try:
        out, lse = selfattn.multihead_attention_lse(q, k, v, ids, sinks=sinks, backend=backend)
    except NotImplementedError as refusal:
        skip_refused(refusal, backend, describe(q, k, v, ids, sinks=sinks, wants_lse=True))
    padded = ids.masked_fill(ids == 1, -1)
    expected, expected_lse = reference.attention(q, k, v, padded, sinks=sinks)
    assert error(out, expected) < ROUNDING[dtype]
    assert error(lse, expected_lse) < max(ROUNDING[dtype], 1e-6)
    grad_out = torch.randn(out.shape).to(dtype)
    actual = torch.autograd.grad(out, leaves, grad_out.to(device))
    for gradient, oracle in zip(actual, reference.gradients(expected, leaves, grad_out), strict=True):
        assert error(gradient, oracle) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_logit_of_plus_infinity_is_nan_in_its_row_alone(
    device: str, backend: str, has_sinks: bool, dtype: torch.dtype
) -> None:
    q, k, v, ids = overflowing(dtype, device, sign=1.0)
    sinks = torch.randn(4).to(device, dtype) if has_sinks else None
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    try:
        out, lse = selfattn.multihead_attention_lse(q, k, v, ids, sinks=sinks, backend=backend)
    except NotImplementedError as refusal:
        skip_refused(refusal, backend, describe(q, k, v, ids, sinks=sinks, wants_lse=True))
    document = ids == 1
    assert out[document].isnan().all()
    assert not lse.transpose(1, 2)[document].isfinite().any()
    expected, _ = reference.attention(q, k, v, ids.masked_fill(document, -1), sinks=sinks)
    assert error(out[~document], expected[~document.cpu()]) < ROUNDING[dtype]
    grad_out = torch.randn(out.shape).to(dtype)
    actual = torch.autograd.grad(out, leaves, grad_out.to(device))
    for gradient, oracle in zip(actual, reference.gradients(expected, leaves, grad_out), strict=True):
        assert error(gradient[~document], oracle[~document]) < GRADIENT_TOLERANCE[dtype]
