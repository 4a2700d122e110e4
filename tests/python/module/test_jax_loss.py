"""The backends agree on the loss by which the JAX system that this module follows tests its own backends."""

import pytest
import torch
from support.serving_table import skip_unless_flash_serves

from selfattn import SelfAttention, SelfAttentionConfig

B, S, E, HEAD_DIM = 8, 256, 512, 128


def run(backend: str, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and gradients, of x and the parameters, of ((out - x)^2).sum(-1).mean()."""
    torch.manual_seed(42)
    module = SelfAttention(E, SelfAttentionConfig(head_dim=HEAD_DIM, attention_backend=backend)).to(device, dtype)
    x = torch.randn(B, S, E).to(device, dtype).requires_grad_()
    ids = torch.randint(0, 2, (B, S), dtype=torch.int32).to(device)  # 0 and 1 in any order
    out = module(x, segment_ids=ids)
    loss = (out - x).square().sum(-1).mean()
    return out.detach().float(), [g.float() for g in torch.autograd.grad(loss, [x, *module.parameters()])]


@pytest.mark.parametrize("backend", ["aten", "flash", "auto", "xla", "pallas_triton"])
def test_backends_agree_on_the_cpu(backend: str) -> None:
    compare(backend, "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aten", "flash", "auto"])
def test_backends_agree_on_the_gpu(backend: str) -> None:
    if backend == "flash":
        skip_unless_flash_serves("cuda", torch.bfloat16, HEAD_DIM)
    compare(backend, "cuda", torch.bfloat16)


@pytest.mark.gpu
def test_cudnn_takes_no_segment_ids() -> None:
    with pytest.raises(NotImplementedError, match="segment ids"):
        run("cudnn", "cuda", torch.bfloat16)


def compare(backend: str, device: str, dtype: torch.dtype) -> None:
    expected, expected_gradients = run("reference", device, dtype)
    out, gradients = run(backend, device, dtype)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)
    for actual, oracle in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, oracle, atol=4e-4, rtol=1e-3)
