"""The lse is the logarithm of the softmax's denominator, in float32, and merges partial results into the whole."""

import pytest
import torch
from support.problems import make_ids

import selfattn


@pytest.mark.parametrize("backend", ["reference", "flash", "auto"])
@pytest.mark.parametrize("kind", ["shuffled", "mixed_padding", "all_padding"])
def test_two_halves_of_the_keys_merge_into_the_whole(backend: str, kind: str) -> None:
    q, k, v = (torch.randn(2, 16, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    ids = make_ids(kind, 2, 16)

    def part(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return selfattn.multihead_attention_lse(
            q, k[:, keys], v[:, keys], ids, False, backend=backend, kv_segment_ids=ids[:, keys]
        )

    whole, whole_lse = selfattn.multihead_attention_lse(q, k, v, ids, False, backend=backend)
    merged, lse = selfattn.merge_attention(*part(slice(0, 7)), *part(slice(7, 16)))
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(lse, whole_lse)
    grad_out = torch.randn_like(whole)
    merged_gradients = torch.autograd.grad(merged, (q, k, v), grad_out)
    for actual, expected in zip(merged_gradients, torch.autograd.grad(whole, (q, k, v), grad_out), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_lse_is_float32_for_every_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        q = torch.randn(1, 4, 2, 8).to(dtype)
        assert selfattn.multihead_attention_lse(q, q, q)[1].dtype == torch.float32
