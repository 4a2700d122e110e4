"""The dense formula by which kernels are judged is the promise as the loops of reference.py state it."""

import pytest
import torch
from support import reference
from support.cases import CASES
from support.problems import Case, dense_attention, error


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense_formula_equals_the_loops(case: Case) -> None:
    case = case.with_(has_grad_lse=True)
    tensors, grads = case.tensors(torch.float64), case.grads(torch.float64)
    results = dense_attention(**tensors, **grads, **case.options)
    leaves = [tensors[name].requires_grad_() for name in "qkv"]
    out, lse = reference.attention(**tensors, **case.options)
    seen = lse.isfinite()
    loss = (out * grads["grad_out"]).sum() + (lse[seen] * grads["grad_lse"][seen]).sum()
    assert torch.equal(case.allowed(tensors).any(-1).expand_as(lse) | case.has_sinks, seen)
    assert error(results["out"], out) < 1e-12 and error(results["lse"], lse) < 1e-12
    for name, gradient in zip(("dq", "dk", "dv"), reference.gradients(loss, leaves), strict=True):
        assert error(results[name], gradient) < 1e-12, name
