"""The module keeps x, q, k, v, the output and its logsumexp for the backward pass, and nothing else."""

import pytest
import torch
from support.problems import make_ids
from support.serving_table import skip_unless_flash_serves
from torch import Tensor

import selfattn

HEADS, KV_HEADS, DIM, EMBEDDING, BATCH, LENGTH = 4, 2, 32, 128, 2, 48


def make_module(device: str, **config) -> selfattn.SelfAttention:
    config = {"head_dim": DIM, "num_kv_heads": KV_HEADS, **config}
    return selfattn.SelfAttention(
        EMBEDDING, selfattn.SelfAttentionConfig(**config), device=device, dtype=torch.bfloat16
    )


def saved_bytes(module: torch.nn.Module, x: Tensor, **inputs) -> tuple[int, Tensor]:
    """Of everything that is not a parameter or an argument other than x, each memory counted once; and the output."""
    others = {p.untyped_storage().data_ptr() for p in module.parameters()}
    others |= {value.untyped_storage().data_ptr() for value in inputs.values() if isinstance(value, Tensor)}
    others |= {t.untyped_storage().data_ptr() for t in inputs.get("freqs") or ()}
    saved: dict[int, int] = {}
    keep = []  # alive, so that no address comes back

    def pack(tensor: Tensor) -> Tensor:
        keep.append(tensor)
        if tensor.untyped_storage().data_ptr() not in others:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x, **inputs)
    return sum(saved.values()), out


@pytest.mark.parametrize("has_freqs", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_nothing_else_is_kept(qk_norm: bool, has_freqs: bool, device: str) -> None:
    module = make_module(device, qk_norm=qk_norm)
    x = torch.randn(BATCH, LENGTH, EMBEDDING, device=device).bfloat16().requires_grad_()
    ids = make_ids("packed", BATCH, LENGTH).to(device)
    skip_unless_flash_serves(device, torch.bfloat16, DIM)
    freqs = tuple(t.to(device) for t in selfattn.precompute_freqs(DIM, max_length=LENGTH)) if has_freqs else None
    found, out = saved_bytes(module, x, freqs=freqs, segment_ids=ids)
    tokens = BATCH * LENGTH
    elements = tokens * (EMBEDDING + 2 * HEADS * DIM + 2 * KV_HEADS * DIM)  # x; q and the output; k and v
    assert found == 2 * elements + 4 * tokens * HEADS  # and the logsumexp
    out.float().sum().backward()
    assert x.grad.isfinite().all()
