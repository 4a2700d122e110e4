"""Any finite qk_scale, negative, zero and vanishing ones too, is what the scores are multiplied by."""

import pytest
import torch
from support import reference
from support.cases import PLACES, ROUNDING
from support.problems import Case, dense_attention, error
from support.serving_table import describe, skip_refused

import selfattn

SCALES = [-0.2, 0.0, -0.0, -3.7, 1e-30, -1e-30, 1e-300, -1e-300]
GRADIENT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
"""Beside what the formula itself loses in the same precision: with scores of 15 and more that varies with the data."""
CALLS = [
    Case("dense", batch=1, num_queries=9, num_keys=9, ids=None),
    Case("documents", batch=1, num_queries=9, num_keys=9, ids="mixed_padding"),
    Case("fewer_queries", batch=1, num_queries=4, num_keys=9, ids=None),
]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=name_of)
@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", CALLS, ids=str)
def test_results_and_gradients_equal_the_oracle(
    case: Case, causal: bool, device: str, backend: str, dtype: torch.dtype, scale: float
) -> None:
    tensors = case.tensors(dtype, device)
    leaves = [tensors[name].requires_grad_() for name in ("q", "k", "v")]
    expected, _ = reference.attention(**tensors, causal=causal, qk_scale=scale)
    grad_out = torch.randn(expected.shape, dtype=torch.float64).to(dtype)
    try:
        out = selfattn.multihead_attention(**tensors, causal=causal, qk_scale=scale, backend=backend)
    except NotImplementedError as refusal:
        skip_refused(refusal, backend, describe(**tensors, causal=causal, qk_scale=scale))
    # A GPU's float32 products add in another order: of scores of 15 and more a last bit is 1e-6 of the weight.
    assert error(out, expected) < max(ROUNDING[dtype], 1e-5 if device == "cuda" else 0.0)
    actual = torch.autograd.grad(out, leaves, grad_out.to(device))
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    call = {**tensors, "causal": causal, "qk_scale": scale, "grad_out": grad_out.to(device)}
    formula = dense_attention(**call, precision=precision, rounding=dtype)
    oracles = reference.gradients(expected, leaves, grad_out)
    for name, gradient, oracle in zip(("dq", "dk", "dv"), actual, oracles, strict=True):
        assert error(gradient, oracle) < GRADIENT_TOLERANCE[dtype] + 2 * error(formula[name], oracle)


@pytest.mark.parametrize("scale", [1e-36, -1e-36, 1e-39, -1e-39])
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_tiny_scale_of_large_products_counts(device: str, backend: str, scale: float) -> None:
    # Products of 1e37 and more: the scale is next to nothing, the scores are not.
    q, k, v = (torch.randn(1, 6, 2, 16, device=device) for _ in range(3))
    q, k = 1e18 * q, 1e19 * k / 2
    try:
        out = selfattn.multihead_attention(q, k, v, qk_scale=scale, backend=backend)
    except NotImplementedError as refusal:
        skip_refused(refusal, backend, describe(q, k, v, qk_scale=scale))
    assert error(out, reference.attention(q, k, v, qk_scale=scale)[0]) < 1e-4


@pytest.mark.parametrize("scale", [-0.2, 0.0, -3.7, 1e-300])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_layer_takes_the_scale(device: str, backend: str, causal: bool, scale: float) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    weights = {
        f"{name}.weight": torch.randn(rows, 64).div(8).to(dtype)
        for name, rows in zip(names, (64, 32, 32, 64), strict=True)
    }
    x = torch.randn(1, 7, 64).to(dtype)
    oracle_x, leaf = x.double().requires_grad_(), x.to(device).requires_grad_()
    expected = reference.self_attention(oracle_x, weights, 16, causal=causal, qk_scale=scale)
    try:
        out = torch.ops.selfattn.self_attention(
            leaf,
            *(weight.to(device) for weight in weights.values()),
            head_dim=16,
            causal=causal,
            qk_scale=scale,
            backend=backend,
        )
    except NotImplementedError as refusal:
        heads = (leaf.detach().new_empty(1, 7, number, 16) for number in (4, 2, 2))
        skip_refused(refusal, backend, describe(*heads, causal=causal, qk_scale=scale))
    grad_out = torch.randn(expected.shape, dtype=torch.float64).to(dtype)
    (gradient,) = torch.autograd.grad(out, leaf, grad_out.to(device))
    (oracle,) = torch.autograd.grad(expected, oracle_x, grad_out.double())
    tolerance = 2e-5 if dtype == torch.float32 else 8e-2
    assert error(out, expected) < tolerance
    assert error(gradient, oracle) < tolerance
