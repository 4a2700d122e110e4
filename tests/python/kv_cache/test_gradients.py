"""Promise: reference and aten differentiate attention over a cache, in q, the caches and the sinks; auto takes one of
them where a gradient is wanted."""

import pytest
import torch
from support.kv_cache import CacheCase, attention
from support.problems import error
from support.serving_table import serves_cache

import selfattn

CASES = {
    "paged": CacheCase(num_queries=3, dtype=torch.float64),
    "dense": CacheCase(num_queries=2, table=None, dtype=torch.float64, window_left=3),
    "ragged": CacheCase(num_queries=7, ids="any_order", dtype=torch.float64),
    "tree": CacheCase(num_queries=4, has_draft_mask=True, dtype=torch.float64),
    "sinks": CacheCase(num_queries=3, has_sinks=True, softcap=1.0, lengths="edges", dtype=torch.float64),
}


@pytest.mark.parametrize("backend", ("reference", "aten", "auto"))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients_are_the_formulas(case: CacheCase, backend: str, device: str) -> None:
    call = case.make(device)
    if not serves_cache(backend, call):
        return
    leaves = [name for name in ("q", "k_cache", "v_cache", "sinks") if name in call]
    for name in leaves:
        call[name] = call[name].requires_grad_()
    out = selfattn.attention_with_kv_cache(**call, backend=backend)
    expected, _ = attention(call)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, [call[name] for name in leaves], grad)
    oracle = torch.autograd.grad(expected, [call[name] for name in leaves], grad.cpu())
    for one, other in zip(actual, oracle, strict=True):
        assert error(one, other) < 1e-6  # and no NaN from slots that nobody sees


def test_lse_is_differentiable(device: str) -> None:
    call = CASES["paged"].make(device) | {"causal": False}
    call["q"].requires_grad_()
    _, lse = selfattn.attention_with_kv_cache_lse(**call)
    _, expected = attention(call)
    finite = expected.isfinite()
    actual = torch.autograd.grad(lse[finite.to(device)].sum(), call["q"])[0]
    assert error(actual, torch.autograd.grad(expected[finite].sum(), call["q"])[0]) < 1e-5


def test_flash_says_that_it_has_no_gradient(device: str) -> None:
    call = CacheCase().make(device)
    call["q"].requires_grad_()
    reasons = selfattn.explain_kv_cache_backend(**call).splitlines()[0]
    assert reasons.startswith("flash: cannot serve this call: ") and "q must not require a gradient" in reasons
    with pytest.raises(NotImplementedError, match="q must not require a gradient"):
        selfattn.attention_with_kv_cache(**call, backend="flash")
    with torch.no_grad():
        assert "require a gradient" not in selfattn.explain_kv_cache_backend(**call)
