"""Selective activation checkpointing with ``attention_operators()`` computes no attention in the backward pass."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import selfattn


class CountCalls(TorchDispatchMode):
    def __init__(self, operator) -> None:
        super().__init__()
        self.operator, self.count = operator, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator is self.operator
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    "options, operator",
    [
        ({}, torch.ops.selfattn.flash_attention.default),
        ({"qk_norm": True}, torch.ops.selfattn.qk_norm_rope_attention.default),
        ({"attention_backend": "aten"}, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default),
    ],
    ids=["flash", "flash with qk_norm", "aten"],
)
def test_attention_runs_once_where_it_is_saved(options: dict, operator, saved: bool) -> None:
    layer = selfattn.SelfAttention(64, selfattn.SelfAttentionConfig(head_dim=16, **options))
    torch.nn.init.normal_(layer.out_proj.weight, std=0.1)
    x = torch.randn(2, 48, 64, requires_grad=True)
    ids = (torch.rand(2, 48) < 0.1).cumsum(1)
    parameters = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x, segment_ids=ids).square().sum(), parameters)

    operators = selfattn.attention_operators() if saved else [torch.ops.aten.mm.default]
    save = functools.partial(create_selective_checkpoint_contexts, operators)
    with CountCalls(operator) as attention:
        out = checkpoint(layer, x, segment_ids=ids, use_reentrant=False, context_fn=save)
        assert attention.count == 1
        found = torch.autograd.grad(out.square().sum(), parameters)
    assert attention.count == (1 if saved else 2)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-4)


def test_the_list_is_the_callers() -> None:
    selfattn.attention_operators().clear()
    assert selfattn.attention_operators()
