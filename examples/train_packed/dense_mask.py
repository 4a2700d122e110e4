"""What a user does today without segment ids: a dense S x S mask, built for every batch, and ATen's SDPA."""

import copy

import torch
import torch.nn.functional as F
from model import LanguageModel
from torch import Tensor, nn

import selfattn


class DenseMaskAttention(nn.Module):
    """The same layer as ``selfattn.SelfAttention``, with its weights, in plain PyTorch: whole rows, without a cache."""

    def __init__(self, attention: selfattn.SelfAttention) -> None:
        super().__init__()
        self.head_dim = attention.head_dim
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.out_proj = attention.v_proj, attention.out_proj

    def forward(
        self, x: Tensor, freqs: tuple[Tensor, Tensor], mask: Tensor, cache: None = None, context: None = None
    ) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, freqs), _rotate(k, freqs)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class DenseMaskModel(nn.Module):
    """A copy of a language model whose layers attend through the dense mask; called as the original."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for layer in self.model.layers:
            layer.attention = DenseMaskAttention(layer.attention)

    def forward(self, tokens: Tensor, segment_ids: Tensor, positions: Tensor, context: None = None) -> Tensor:
        # Padding attends to padding here, or its rows of the softmax would be empty: its loss is not counted.
        same_document = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        length = tokens.shape[1]
        mask = same_document & torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        freqs = selfattn.precompute_freqs(self.model.head_dim, positions, None, self.model.rope_theta)
        x = self.model.embedding(tokens)
        for layer in self.model.layers:
            x = layer(x, freqs, mask)
        return self.model.head(self.model.norm(x)).float()


def _rotate(x: Tensor, freqs: tuple[Tensor, Tensor]) -> Tensor:
    sin, cos = (freq.unsqueeze(2).to(x.dtype) for freq in freqs)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
