"""Every backend's gradients of out and lse, of q, k, v and the sinks, equal those of the written-out softmax."""

import pytest
import torch
from support import reference
from support.cases import CASES, PLACES
from support.problems import Case, error
from support.serving_table import describe, is_refused

import selfattn

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_the_oracle(case: Case, device: str, backend: str, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype, device)
    leaves = [tensors[name].requires_grad_() for name in ("q", "k", "v", "sinks") if name in tensors]
    expected, expected_lse = reference.attention(**tensors, **case.options)
    grad_out = torch.randn(expected.shape, dtype=torch.float64).to(dtype)
    # Of lse the rows that have a value: the gradient of -inf means nothing.
    finite = expected_lse.isfinite()
    grad_lse = torch.where(finite, torch.randn(expected_lse.shape), 0.0)

    call = {**tensors, **case.options, "backend": backend}
    facts = describe(**tensors, **case.options)
    if is_refused(backend, facts, lambda: selfattn.multihead_attention(**call)):
        return
    out = selfattn.multihead_attention(**call)
    compare(out, grad_out, expected, leaves, TOLERANCE[dtype])
    if is_refused(backend, facts.with_(wants_lse=True), lambda: selfattn.multihead_attention_lse(**call)):
        return
    out, lse = selfattn.multihead_attention_lse(**call)
    total = (out * grad_out.to(device)).sum().double() + (lse[finite] * grad_lse.to(device)[finite]).sum().double()
    oracle = (expected * grad_out.double()).sum() + (expected_lse[finite] * grad_lse[finite]).sum()
    compare(total, None, oracle, leaves, TOLERANCE[dtype])


def compare(out, grad_out, expected, leaves: list[torch.Tensor], tolerance: float) -> None:
    actual = torch.autograd.grad(out, leaves, None if grad_out is None else grad_out.to(out.device))
    for gradient, oracle, leaf in zip(actual, reference.gradients(expected, leaves, grad_out), leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert error(gradient, oracle) < tolerance
