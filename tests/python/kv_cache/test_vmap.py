"""What reads a KV cache can be mapped by vmap, by PyTorch's loop; what writes one is refused."""

import warnings

import pytest
import torch
from support.problems import error
from torch import Tensor

import selfattn


def test_a_cache_is_read_under_vmap_and_not_written() -> None:
    warnings.filterwarnings("ignore", message=".*batching rule")
    q, k, lengths = torch.randn(3, 2, 1, 4, 8), torch.randn(2, 16, 2, 8), torch.tensor([5, 9])

    def attend(q: Tensor, lengths: Tensor) -> Tensor:
        return selfattn.attention_with_kv_cache(q, k, k, lengths)

    assert error(torch.vmap(attend, (0, None))(q, lengths), torch.stack([attend(x, lengths) for x in q])) < 1e-6
    several = torch.tensor([[5, 9], [1, 16]])
    expected = torch.stack([attend(q[0], x) for x in several])
    assert error(torch.vmap(attend, (None, 0))(q[0], several), expected) < 1e-6

    def append(tokens: Tensor) -> Tensor:
        selfattn.append_kv_cache(tokens, tokens, torch.tensor([[1], [2]]), k_cache=k, v_cache=k.clone())
        return tokens

    with pytest.raises(RuntimeError, match="append_kv_cache"):
        torch.vmap(append)(q[..., :2, :])
