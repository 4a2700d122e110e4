"""On the CPU, logits of any size that float32 holds give results no less exact than those of PyTorch's own kernels."""

import math
import os

import pytest
import torch
from support.problems import dense_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import selfattn  # noqa: F401  (registers the operators)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
NAMES = ("out", "lse", "dq", "dk", "dv")


def run(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, sinks: Tensor | None = None, **options) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    out, lse = torch.ops.selfattn.flash_attention(q, k, v, **options, sinks=sinks)
    return [out, lse, *torch.ops.selfattn.flash_attention_backward(grad_out, None, q, k, v, out, lse, **options)]


def sdpa(backend: SDPBackend, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = [tensor.to(dtype).transpose(1, 2).detach().requires_grad_() for tensor in (q, k, v)]
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(*leaves, is_causal=True)
    grads = torch.autograd.grad(out, leaves, grad_out.to(dtype).transpose(1, 2))
    return [tensor.detach().transpose(1, 2) for tensor in (out, *grads)]


def distance(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).norm().item()


def make_tensors(length: int, dim: int, factor: float, dtype: torch.dtype = torch.float32, heads: int = 4):
    q, k = (torch.randn(1, length, heads, dim) * factor for _ in range(2))
    return [tensor.to(dtype) for tensor in (q, k, torch.randn(1, length, heads, dim), torch.randn_like(q))]


@DTYPES
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("size", [1e2, 1e3, 1e4, 1e5, 1e7, 4e9, 1e13])
def test_error_is_at_most_twice_that_of_sdpa(size: float, dim: int, dtype: torch.dtype) -> None:
    """The logits' standard deviation is ``size``."""
    if dtype == torch.float16 and size > 1e7:
        pytest.skip("q and k would not fit in float16")
    if dtype == torch.bfloat16 and "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.skip("PyTorch's flash kernel fails where AVX-512 is hidden from it on a CPU with AMX")
    tensors = make_tensors(130, dim, math.sqrt(size), dtype)
    out, _, *grads = run(*tensors)
    exact = sdpa(SDPBackend.MATH, torch.float64, *tensors)
    peers = [sdpa(backend, dtype, *tensors) for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)]
    for name, actual, expected, *found in zip(("out", "dq", "dk", "dv"), (out, *grads), exact, *peers, strict=True):
        assert actual.isfinite().all(), name
        if all(peer.isfinite().all() for peer in found):  # SDPA's own gradients are not always finite here
            bound = 2 * max(distance(peer, expected) for peer in found) + 1e-6 * expected.norm().item()
            assert distance(actual, expected) <= bound, name


@DTYPES
@pytest.mark.parametrize("size", [1e5, 1e9, 1e13])
def test_one_key_with_all_weight_gives_its_value_and_gradient(size: float, dtype: torch.dtype) -> None:
    """Orthogonal keys: each query meets its own key with a logit far above all others."""
    if dtype == torch.float16 and size > 1e7:
        pytest.skip("q and k would not fit in float16")
    factor = math.sqrt(size * 8)
    q = (torch.eye(64)[None, :, None] * factor).to(dtype)
    v, grad_out = torch.randn(1, 64, 1, 24).to(dtype), torch.randn(1, 64, 1, 24).to(dtype)
    out, _, _, _, dv = run(q, q, v, grad_out, causal=False)
    assert torch.equal(out, v)
    assert torch.equal(dv, grad_out)


def test_bfloat16_inputs_of_133120_stay_finite() -> None:
    q, k = (torch.full((1, 70, 2, 128), 133120.0, dtype=torch.bfloat16) for _ in range(2))
    v, grad_out = torch.randn(1, 70, 2, 128).bfloat16(), torch.randn(1, 70, 2, 128).bfloat16()
    results = run(q, k, v, grad_out)
    assert all(result.isfinite().all() for result in results)
    expected = v.float().cumsum(1) / torch.arange(1, 71)[None, :, None, None]  # all logits are equal
    torch.testing.assert_close(results[0].float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("factor", [1, 4, 30])
@pytest.mark.parametrize("offset", [0.0, -3000.0])
@pytest.mark.parametrize(("length", "dim"), [(65, 224), (65, 32), (129, 64), (200, 128), (100, 256)])
def test_float32_error_is_at_most_twice_that_of_the_formula(
    length: int, dim: int, offset: float, factor: int, has_sinks: bool
) -> None:
    """A constant component gives the logits an offset. Errors of some draws count together: each alone is random."""
    errors, bounds = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for _ in range(3):
        tensors = make_tensors(length, dim, 1.0)
        tensors[0] *= factor
        if offset:
            tensors[0][..., 0], tensors[1][..., 0] = offset * math.sqrt(dim) / 8, 8.0
        sinks = torch.randn(4) + offset if has_sinks else None
        call = {**dict(zip("qkv", tensors, strict=False)), "sinks": sinks}
        saved = dense_attention(**call, precision=torch.float32)  # a backward pass knows what the forward pass left
        exact = dense_attention(**call, grad_out=tensors[3])
        peers = dense_attention(**call, grad_out=tensors[3], **saved, precision=torch.float32)
        for name, actual in zip(NAMES, run(*tensors, sinks), strict=True):
            errors[name] += distance(actual, exact[name]) ** 2
            bounds[name] += max(2 * distance(peers[name], exact[name]), 4e-7 * exact[name].norm().item()) ** 2
    for name in NAMES:
        assert errors[name] <= bounds[name], (name, math.sqrt(errors[name] / bounds[name]))
