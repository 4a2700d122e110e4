"""A block of queries that is all padding beside one of a single document, in rows whose ids are compared: with sinks
padding has a finite lse, and must still give nothing to keys."""

import pytest
import torch
from support.problems import dense_attention, norm_error

import selfattn  # noqa: F401

pytestmark = pytest.mark.gpu
OPS = torch.ops.selfattn


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("place", [64, 128])
def test_padding_gives_keys_nothing(place: int, dim: int, has_sinks: bool, causal: bool) -> None:
    ids = torch.zeros(1, 1024, dtype=torch.int32)
    ids[:, place : 2 * place] = -1
    ids[:, 512:576] = 3  # id 0 comes back behind it: the general way
    q, k, v, grad = (torch.randn(1, 1024, 2, dim, device="cuda").bfloat16() for _ in range(4))
    sinks = torch.full((2,), 0.5, device="cuda") if has_sinks else None
    ids = ids.cuda()
    out, lse = OPS.flash_attention(q, k, v, ids, causal, sinks=sinks)
    found = OPS.flash_attention_backward(grad, None, q, k, v, out, lse, ids, causal)
    exact = dense_attention(q, k, v, ids, causal, sinks=sinks, grad_out=grad, out=out, lse=lse)
    for gradient, name in zip(found, ("dq", "dk", "dv"), strict=True):
        assert norm_error(gradient, exact[name]) < 2e-2, name
