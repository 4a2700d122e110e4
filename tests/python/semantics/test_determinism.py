"""The forward pass gives the same bits every time; so does the backward pass where PyTorch is asked for it."""

import pytest
import torch
from support.problems import make_ids, zigzag

import selfattn


@pytest.mark.parametrize("has_positions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_runs_give_the_same_bits(
    dtype: torch.dtype, has_positions: bool, device: str, deterministic: None
) -> None:
    length = 300
    q, k, v = (torch.randn(2, length, heads, 64, device=device).to(dtype).requires_grad_() for heads in (8, 2, 2))
    ids = make_ids("shuffled", 2, length).to(device)
    positions = zigzag(length).expand(2, length).to(device) if has_positions else None
    grad_out = torch.randn(2, length, 8, 64, device=device).to(dtype)

    def run() -> list[torch.Tensor]:
        out = selfattn.multihead_attention(q, k, v, ids, positions=positions)
        return [out, *torch.autograd.grad(out, (q, k, v), grad_out)]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
