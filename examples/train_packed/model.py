"""A small Llama-style language model over bytes: the project's SelfAttention in every layer, RMSNorm, SwiGLU."""

from typing import Any

import torch
import torch.nn.functional as F
from packing import VOCABULARY
from torch import Tensor, nn

import selfattn


class SwiGlu(nn.Module):
    """The feed-forward part of Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(embedding_dim, hidden_dim, bias=False)
        self.up = nn.Linear(embedding_dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, embedding_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, embedding_dim: int, hidden_dim: int, config: selfattn.SelfAttentionConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(embedding_dim, eps=config.norm_eps)
        self.attention = selfattn.SelfAttention(embedding_dim, config)
        self.feed_forward_norm = nn.RMSNorm(embedding_dim, eps=config.norm_eps)
        self.feed_forward = SwiGlu(embedding_dim, hidden_dim)

    def forward(
        self,
        x: Tensor,
        freqs: tuple[Tensor, Tensor] | None,
        segment_ids: Tensor | None,
        cache: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None,
        context: Any | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), freqs, segment_ids, cache, context)
        return x + self.feed_forward(self.feed_forward_norm(x))


class LanguageModel(nn.Module):
    """Next-byte logits over packed rows.

    forward(tokens (B, S) int64, segment_ids (B, S) or None, positions (B, S) or None) -> (B, S, VOCABULARY); no ids
    are one document a row, no positions are 0..S-1.

    With ``cache``, ``KVCache.layer(i)`` of every layer, the tokens go on with the sequences in it: ids are its rows, no
    ids are row b for batch b, no positions are the tokens' places behind the lengths of their rows. Keys and values are
    written; the lengths stay as they are.

    With ``context``, the ``ContextLayout`` of whole rows, everything is of this rank's tokens, (B, L): ids are the
    layout's own.
    """

    def __init__(
        self, embedding_dim: int, hidden_dim: int, num_layers: int, config: selfattn.SelfAttentionConfig
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        self.num_layers = num_layers
        self.num_kv_heads = config.num_kv_heads or embedding_dim // config.head_dim
        self.embedding = nn.Embedding(VOCABULARY, embedding_dim)
        self.layers = nn.ModuleList(Layer(embedding_dim, hidden_dim, config) for _ in range(num_layers))
        self.norm = nn.RMSNorm(embedding_dim, eps=config.norm_eps)
        self.head = nn.Linear(embedding_dim, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=1.0)
        nn.init.zeros_(self.head.weight)

    def forward(
        self,
        tokens: Tensor,
        segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
        cache: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] | None = None,
        context: Any | None = None,
    ) -> Tensor:
        if positions is None and cache is None:
            positions = torch.arange(tokens.size(1), device=tokens.device).unsqueeze(0)
        # The angles are the same in every layer: computed once a step. Those of a cache's slots every layer knows.
        freqs: tuple[Tensor, Tensor] | None = None
        if positions is not None:
            freqs = selfattn.precompute_freqs(self.head_dim, positions, None, self.rope_theta)
        x = self.embedding(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, freqs, segment_ids, None if cache is None else cache[i], context)
        return self.head(self.norm(x)).float()
