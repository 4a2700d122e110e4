"""Strides do not change the result: transposed views, slices of a packed projection, broadcast and offset tensors."""

import pytest
import torch
from support.cases import BACKENDS_ON_CPU
from support.problems import make_ids

import selfattn

B, S, NH, NKV, D = 2, 20, 4, 2, 16


def from_heads_first() -> list[torch.Tensor]:
    """(B, N, S, D) tensors seen as (B, S, N, D)."""
    return [torch.randn(B, heads, S, D).transpose(1, 2) for heads in (NH, NKV, NKV)]


def from_packed_projection() -> list[torch.Tensor]:
    packed = torch.randn(B, S, (NH + 2 * NKV) * D)
    q, k, v = packed.split([NH * D, NKV * D, NKV * D], dim=-1)
    return [tensor.unflatten(-1, (-1, D)) for tensor in (q, k, v)]


def from_interleaved_projection() -> list[torch.Tensor]:
    return list(torch.randn(B, S, 3, NH, D).unbind(2))


def from_broadcast_batch() -> list[torch.Tensor]:
    return [torch.randn(1, S, heads, D).expand(B, S, heads, D) for heads in (NH, NKV, NKV)]


def from_longer_rows() -> list[torch.Tensor]:
    return [torch.randn(B, 2 * S + 3, heads, D)[:, 3::2] for heads in (NH, NKV, NKV)]


def from_last_dimension_apart() -> list[torch.Tensor]:
    """The last dimension is not contiguous: such a tensor may be copied, but not misread."""
    return [torch.randn(B, S, heads, 2 * D)[..., ::2] for heads in (NH, NKV, NKV)]


def from_reversed_dimensions() -> list[torch.Tensor]:
    return [torch.randn(D, heads, S, B).permute(3, 2, 1, 0) for heads in (NH, NKV, NKV)]


LAYOUTS = [
    from_heads_first,
    from_packed_projection,
    from_interleaved_projection,
    from_broadcast_batch,
    from_longer_rows,
    from_last_dimension_apart,
    from_reversed_dimensions,
]


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("has_ids", [True, False])
def test_result_and_gradients_equal_those_of_contiguous_tensors(backend: str, layout, has_ids: bool) -> None:
    views = layout()
    ids = make_ids("shuffled", B, S) if has_ids else None
    assert not all(view.is_contiguous() for view in views)

    def run(tensors: list[torch.Tensor], grad_out: torch.Tensor) -> list[torch.Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = selfattn.multihead_attention(*leaves, ids, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, grad_out)]

    grad_out = torch.randn(B, NH, S, D).transpose(1, 2)
    actual = run(views, grad_out)
    for a, b in zip(actual, run([view.contiguous() for view in views], grad_out.contiguous()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_strided_ids_are_read_right() -> None:
    q = torch.randn(B, S, NH, D)
    ids = make_ids("shuffled", B, 2 * S)[:, ::2]
    expected = selfattn.multihead_attention(q, q, q, ids.contiguous())
    assert torch.equal(selfattn.multihead_attention(q, q, q, ids), expected)
    assert torch.equal(selfattn.multihead_attention(q, q, q, ids.t().contiguous().t()), expected)
    one_row = torch.randint(0, 3, (1, S), dtype=torch.int32)
    assert torch.equal(
        selfattn.multihead_attention(q, q, q, one_row.expand(B, S)),
        selfattn.multihead_attention(q, q, q, one_row.repeat(B, 1)),
    )
