"""CUDA flash: large logits cost no more than in PyTorch's own fused attention, and finite ones never give NaN."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.problems import dense_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import selfattn

pytestmark = pytest.mark.gpu

LARGEST = (1e2, 7e2, 1.4e3, 1e4, 1e5, 1e6, 1e9, 1e11)
"""About the largest logit of a problem."""


def run(attend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def sdpa_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return selfattn.multihead_attention(q, k, v, backend="flash")


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "length"), [(64, 300), (128, 512), (256, 400), (64, 2304), (128, 2304)])
def test_large_logits_are_as_good_as_in_sdpa(dim: int, length: int, dtype: torch.dtype, largest: float) -> None:
    spread = math.sqrt(largest / 4)
    if dtype == torch.float16 and spread > 1e4:
        pytest.skip("float16 does not hold such inputs")
    q, k = ((torch.randn(2, length, 2, dim, device="cuda") * spread).to(dtype) for _ in range(2))
    v, grad = (torch.randn(2, length, 2, dim, device="cuda").to(dtype) for _ in range(2))
    exact = dense_attention(q, k, v, grad_out=grad)
    mine, peer = run(ours, q, k, v, grad), run(sdpa_flash, q, k, v, grad)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for name, actual, other in zip(("out", "dq", "dk", "dv"), mine, peer, strict=True):
        assert actual.isfinite().all(), f"{name} is not finite"
        error = (actual.double() - exact[name]).abs().max().item()
        allowance = (other.double() - exact[name]).abs().max().item()
        if not math.isfinite(allowance):
            continue
        # A gradient that cancels down to nothing is as wrong as the rounding of what cancels: out in 16 bits.
        floor = rounding * max(exact[name].abs().max().item(), 1.0)
        assert error <= 2 * allowance + floor, f"{name}: error {error:.2e}, SDPA's {allowance:.2e}"


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_equal_inputs_of_133120_give_the_mean(dim: int, is_causal: bool) -> None:
    q, k = (torch.full((1, 300, 2, dim), 133120.0, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(1, 300, 2, dim, device="cuda").bfloat16()
    out = selfattn.multihead_attention(q, k, v, causal=is_causal, backend="flash")
    counts = torch.arange(1, 301, device="cuda").view(1, -1, 1, 1)
    mean = v.double().cumsum(1) / counts if is_causal else v.double().mean(1, keepdim=True).expand_as(v)
    torch.testing.assert_close(out.double(), mean, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("scale", [-0.2, -0.0, 0.0, -3.0, 1e-320, -1e-300, 1e300])
@pytest.mark.parametrize("causal", [True, False])
def test_every_finite_scale(scale: float, causal: bool) -> None:
    q, k, v, grad = (torch.randn(2, 200, 2, 64, device="cuda").bfloat16() for _ in range(4))

    def attend(backend: str):
        return lambda q, k, v: selfattn.multihead_attention(q, k, v, causal=causal, qk_scale=scale, backend=backend)

    mine = run(attend("flash"), q, k, v, grad)
    folded = [tensor.double() for tensor in (q, k, v, grad)]
    exact = run(attend("reference"), *folded) if abs(scale) < 1e100 else mine
    names = ("out", "dq", "dk", "dv") if abs(scale) < 1e100 else ("out",)  # with infinite logits, gradients overflow
    for name, actual, expected in zip(names, mine, exact, strict=False):
        assert actual.isfinite().all(), name
        limit = max(expected.double().abs().max().item(), 0.3)
        assert (actual.double() - expected.double()).abs().max().item() <= 2e-2 * limit, name
