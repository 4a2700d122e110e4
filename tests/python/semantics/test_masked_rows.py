"""A query with no allowed key gives 0, an lse of -inf (the sink, where there is one), and no gradients; never NaN."""

import math

import pytest
import torch
from support.cases import BACKENDS_ON_CPU
from support.problems import make_ids
from support.serving_table import describe, is_refused

import selfattn

IDS = torch.tensor([[-1, 0, 0, -7, 1, 1], [-1, -1, -1, -1, -1, -1]], dtype=torch.int32)
PADDING = IDS < 0


def random_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(2, 6, heads, 16).to(dtype).requires_grad_() for heads in (4, 2, 2)]


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_gives_zero_and_takes_no_gradient(backend: str, dtype: torch.dtype, causal: bool) -> None:
    q, k, v = random_inputs(dtype)
    out = selfattn.multihead_attention(q, k, v, IDS, causal, backend=backend)
    assert (out[PADDING] == 0).all()
    assert (out[~PADDING] != 0).all()
    for gradient in torch.autograd.grad(out, (q, k, v), torch.randn_like(out)):
        assert gradient.isfinite().all()
        assert (gradient[PADDING] == 0).all()
        assert (gradient != 0).any()


@pytest.mark.parametrize("backend", ["reference", "flash", "auto"])
def test_lse_of_an_empty_row_is_minus_infinity(backend: str) -> None:
    q, k, v = random_inputs(torch.float32)
    _, lse = selfattn.multihead_attention_lse(q, k, v, IDS, backend=backend)
    rows = lse.transpose(1, 2)  # (B, S, NH)
    assert (rows[PADDING] == -math.inf).all()
    assert rows[~PADDING].isfinite().all()
    gradients = torch.autograd.grad(rows[~PADDING].sum(), (q, k))
    assert all(gradient.isfinite().all() and (gradient[PADDING] == 0).all() for gradient in gradients)


@pytest.mark.parametrize("backend", ["reference", "flash", "auto"])
def test_lse_of_an_empty_row_is_the_sink_where_there_is_one(backend: str) -> None:
    q, k, v = random_inputs(torch.float32)
    sinks = torch.randn(4, requires_grad=True)
    out, lse = selfattn.multihead_attention_lse(q, k, v, IDS, backend=backend, sinks=sinks)
    assert (out[PADDING] == 0).all()
    torch.testing.assert_close(lse.transpose(1, 2)[PADDING], sinks.detach().expand(int(PADDING.sum()), 4))
    for gradient in torch.autograd.grad(out, (q, k, v, sinks), torch.randn_like(out)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
def test_queries_before_all_keys_are_empty_rows(backend: str) -> None:
    # Bottom-right alignment: of five queries and two keys, the first three see no key.
    q, k, v = torch.randn(1, 5, 2, 8), torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8)
    out = selfattn.multihead_attention(q, k, v, backend=backend)
    assert (out[:, :3] == 0).all() and (out[:, 3:] != 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "cudnn", "aten", "reference", "auto"])
@pytest.mark.parametrize("kind", ["mixed_padding", "all_padding"])
def test_padding_on_the_gpu_gives_zero_and_no_nan(backend: str, kind: str) -> None:
    ids = make_ids(kind, 2, 256).cuda()
    q, k, v = (torch.randn(2, 256, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    call = lambda: selfattn.multihead_attention(q, k, v, ids, backend=backend)  # noqa: E731
    if is_refused(backend, describe(q, k, v, ids), call):
        return
    out = call()
    assert (out[ids < 0] == 0).all()
    for gradient in torch.autograd.grad(out, (q, k, v), torch.randn_like(out)):
        assert gradient.isfinite().all() and (gradient[ids < 0] == 0).all()
