"""Empty batches, no queries and no keys give empty or zero results, as in PyTorch, with gradients of their shapes."""

import math

import pytest
import torch
from support.cases import BACKENDS_ON_CPU
from support.serving_table import describe, is_refused

import selfattn

SHAPES = {"no_batch": (0, 4, 4), "no_tokens": (2, 0, 0), "no_queries": (2, 0, 4), "no_keys": (2, 4, 0)}


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("has_ids", [True, False])
def test_empty_input(backend: str, shape: tuple[int, int, int], has_ids: bool) -> None:
    batch, num_queries, num_keys = shape
    q = torch.randn(batch, num_queries, 4, 8, requires_grad=True)
    k, v = (torch.randn(batch, num_keys, 2, 8, requires_grad=True) for _ in range(2))
    ids = {}
    if has_ids:
        ids["segment_ids"] = torch.zeros(batch, num_queries, dtype=torch.int32)
        ids["kv_segment_ids"] = torch.zeros(batch, num_keys, dtype=torch.int32)
    call = lambda: selfattn.multihead_attention(q, k, v, **ids, backend=backend)  # noqa: E731
    if is_refused(backend, describe(q, k, v, **ids), call):
        return
    out = call()
    assert out.shape == q.shape
    assert (out == 0).all()
    for gradient, tensor in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert gradient.shape == tensor.shape and (gradient == 0).all()


def test_auto_gives_an_lse_of_minus_infinity_without_keys() -> None:
    q, k = torch.randn(2, 4, 4, 8), torch.randn(2, 0, 2, 8)
    _, lse = selfattn.multihead_attention_lse(q, k, k)
    assert lse.shape == (2, 4, 4) and (lse == -math.inf).all()


@pytest.mark.parametrize("shape", [(0, 5, 32), (2, 0, 32)])
def test_module_takes_empty_input(shape: tuple[int, ...]) -> None:
    module = selfattn.SelfAttention(32, selfattn.SelfAttentionConfig(head_dim=16, qk_norm=True))
    x = torch.randn(shape, requires_grad=True)
    out = module(x, segment_ids=torch.zeros(shape[:2], dtype=torch.int64))
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape
