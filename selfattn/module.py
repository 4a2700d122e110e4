"""The self-attention layer: it holds weights and hands them to the one operator that does the work."""

import math

import torch
from torch import Tensor, nn

from selfattn.config import SelfAttentionConfig


class SelfAttention(nn.Module):
    """Multi-head self-attention over packed documents: projections, optional RMSNorm of q and k, rotary embedding,
    attention inside each document, output projection, dropout.

    The forward pass is one call of ``torch.ops.selfattn.self_attention``, the same that the C++ module makes: a state
    dict moves between the two, and ``torch.jit.script`` gives a file that runs where there is no Python.

    Args:
        embedding_dim: E, the width of the input and output; a multiple of ``config.head_dim``.
        config: everything else, see ``SelfAttentionConfig``.
        device: of the parameters.
        dtype: of the parameters; None takes ``config.dtype``.

    Parameters, with NH = E / head_dim query heads and NKV key/value heads: ``q_proj.weight`` (E, E), ``k_proj.weight``
    and ``v_proj.weight`` (NKV * head_dim, E), ``out_proj.weight`` (E, E), their ``bias`` with ``use_bias``;
    ``q_norm.weight`` and ``k_norm.weight`` (head_dim,) with ``qk_norm``; ``sinks`` (NH,) with ``sinks``.

    Raises:
        ValueError: ``embedding_dim`` or ``num_kv_heads`` does not fit ``head_dim``.
        NotImplementedError: ``config.parallel`` asks for an axis over several devices.
    """

    def __init__(
        self,
        embedding_dim: int,
        config: SelfAttentionConfig = SelfAttentionConfig(),  # noqa: B008 -- frozen
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, SelfAttentionConfig):
            raise TypeError(f"SelfAttention: config: expected a SelfAttentionConfig, got {type(config).__name__}")
        if embedding_dim <= 0 or embedding_dim % config.head_dim != 0:
            raise ValueError(
                f"SelfAttention: embedding_dim: expected a positive multiple of head_dim {config.head_dim}, "
                f"got {embedding_dim}"
            )
        config.parallel.require_single_device("SelfAttention")
        num_heads = embedding_dim // config.head_dim
        num_kv_heads = num_heads if config.num_kv_heads is None else config.num_kv_heads
        if num_heads % num_kv_heads != 0:
            raise ValueError(
                f"SelfAttention: config.num_kv_heads: expected a divisor of the {num_heads} query heads "
                f"(embedding_dim {embedding_dim} / head_dim {config.head_dim}), got {num_kv_heads}"
            )

        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        self.use_bias = config.use_bias
        self.dropout_rate = float(config.dropout_rate)
        self.num_layers = config.num_layers
        self.attention_backend = config.attention_backend
        self.causal = config.causal
        self.window_left = config.window_left
        self.window_right = config.window_right
        self.softcap = float(config.softcap)
        self.rope_theta = float(config.rope_theta)
        self.rope_pairing = config.rope_pairing
        self.norm_eps = float(config.norm_eps)

        placed = {"device": device, "dtype": config._dtype if dtype is None else dtype}
        kv_dim = num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(embedding_dim, embedding_dim, bias=config.use_bias, **placed)
        self.k_proj = nn.Linear(embedding_dim, kv_dim, bias=config.use_bias, **placed)
        self.v_proj = nn.Linear(embedding_dim, kv_dim, bias=config.use_bias, **placed)
        self.out_proj = nn.Linear(embedding_dim, embedding_dim, bias=config.use_bias, **placed)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=self.norm_eps, **placed) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=self.norm_eps, **placed) if config.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(num_heads, **placed)) if config.sinks else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """q, k, v: normal with standard deviation sqrt(2 / (5 E)) (small init: Nguyen and Salazar, arXiv:1910.05895);
        out: normal with 2 / (2 num_layers) / sqrt(E), two residual blocks a layer (Wang and Komatsuzaki 2021,
        mesh-transformer-jax). Both as GPT-NeoX has them (arXiv:2204.06745). Biases and sinks 0, norm weights 1."""
        std = math.sqrt(2 / (5 * self.embedding_dim))
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=std)
        nn.init.normal_(self.out_proj.weight, std=2 / (2 * self.num_layers) / math.sqrt(self.embedding_dim))
        if self.use_bias:
            for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
                nn.init.zeros_(projection.bias)
        if self.q_norm is not None and self.k_norm is not None:
            nn.init.ones_(self.q_norm.weight)
            nn.init.ones_(self.k_norm.weight)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self,
        x: Tensor,
        freqs: tuple[Tensor, Tensor] | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Attention of every token to the allowed tokens of its document.

        Args:
            x: (B, S, E).
            freqs: (sin, cos) of ``precompute_freqs``, each (1 or B, S, head_dim / 2). None takes positions 0..S-1:
                for packed rows pass those of each document's own positions.
            segment_ids: (B, S) int32 or int64; equal ids attend to each other, negative ids are padding. None is one
                document a row.

        Returns:
            (B, S, E), of x's dtype.
        """
        freqs_sin: Tensor | None = None
        freqs_cos: Tensor | None = None
        if freqs is not None:
            freqs_sin, freqs_cos = freqs
        q_norm_weight: Tensor | None = None
        k_norm_weight: Tensor | None = None
        if self.q_norm is not None and self.k_norm is not None:
            q_norm_weight = self.q_norm.weight
            k_norm_weight = self.k_norm.weight
        return torch.ops.selfattn.self_attention(
            x,
            self.q_proj.weight,
            self.k_proj.weight,
            self.v_proj.weight,
            self.out_proj.weight,
            self.q_proj.bias,
            self.k_proj.bias,
            self.v_proj.bias,
            self.out_proj.bias,
            q_norm_weight,
            k_norm_weight,
            self.sinks,
            freqs_sin,
            freqs_cos,
            segment_ids,
            head_dim=self.head_dim,
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            rope_pairing=self.rope_pairing,
            causal=self.causal,
            backend=self.attention_backend,
            window_left=self.window_left,
            window_right=self.window_right,
            softcap=self.softcap,
            dropout_rate=self.dropout_rate,
            training=self.training,
        )

    def extra_repr(self) -> str:
        parts = [f"{self.embedding_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        parts.append(f"causal={self.causal}")
        defaults = SelfAttentionConfig()
        for name in ("window_left", "window_right", "softcap", "rope_theta", "rope_pairing", "dropout_rate"):
            if getattr(self, name) != getattr(defaults, name):
                parts.append(f"{name}={getattr(self, name)}")
        if self.sinks is not None:
            parts.append("sinks=True")
        parts.append(f"backend={self.attention_backend}")
        return ", ".join(parts)
