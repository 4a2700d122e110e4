"""Autocast runs the attention in the lower precision, leaves ids and float64 alone, and keeps gradients' dtypes."""

import pytest
import torch
from support.problems import make_ids

import selfattn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_cast_down_and_gradients_come_back(dtype: torch.dtype, device: str) -> None:
    q, k, v = (torch.randn(2, 12, 2, 16, device=device, requires_grad=True) for _ in range(3))
    ids = make_ids("shuffled", 2, 12).to(device)
    with torch.autocast(device, dtype=dtype):
        out = selfattn.multihead_attention(q, k, v, ids)
        out_and_lse = selfattn.multihead_attention_lse(q, k, v, ids)
    assert out.dtype == dtype
    assert out_and_lse[0].dtype == dtype and out_and_lse[1].dtype == torch.float32
    expected = selfattn.multihead_attention(q.to(dtype), k.to(dtype), v.to(dtype), ids)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and (q.grad != 0).any()


def test_inputs_of_mixed_dtypes_are_made_equal(device: str) -> None:
    q, k, v = (
        torch.randn(1, 6, 2, 16, device=device).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)
    )
    with torch.autocast(device, dtype=torch.bfloat16):
        assert selfattn.multihead_attention(q, k, v).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"^selfattn: k "):
        selfattn.multihead_attention(q, k, v)


def test_large_ids_are_not_rounded(device: str) -> None:
    """2^24 and 2^24 + 1 are one number in float32, 256 and 257 one in bfloat16."""
    ids = torch.tensor([[2**24, 2**24 + 1, 256, 257]], device=device)
    q = torch.randn(1, 4, 2, 16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = selfattn.multihead_attention(q, q, q, ids)
    assert torch.equal(out, q.bfloat16())  # each token sees itself alone


def test_module_runs_in_the_lower_precision(device: str) -> None:
    module = selfattn.SelfAttention(
        64, selfattn.SelfAttentionConfig(head_dim=32, qk_norm=True, sinks=True), device=device
    )
    x = torch.randn(2, 10, 64, device=device)
    ids = make_ids("packed", 2, 10).to(device)
    expected = module(x, segment_ids=ids)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = module(x, segment_ids=ids)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_disabled_autocast_changes_nothing(device: str) -> None:
    q = torch.randn(1, 6, 2, 16, device=device)
    with torch.autocast(device, enabled=False):
        assert selfattn.multihead_attention(q, q, q).dtype == torch.float32
