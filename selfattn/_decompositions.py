"""The operators of ``torch.ops.selfattn`` as functions of ATen operators, for exporters that know no others (ONNX).

What they compute is docs/semantics.md's formula, in float32 or float64, with memory for every pair of tokens; nothing
here reads a value of a tensor, and batch and length may be symbols.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

Decomposition = Callable[..., Tensor | tuple[Tensor, ...]]


def decompositions() -> dict[torch._ops.OpOverload, Decomposition]:
    """A table for ``torch.export.ExportedProgram.run_decompositions`` that leaves no operator of selfattn in a graph of
    the forward pass.

        program = torch.export.export(model, args, dynamic_shapes=...).run_decompositions(selfattn.decompositions())
        torch.onnx.export(program, dynamo=True).save("model.onnx")

    Every ``backend`` becomes the same formula. A row without an allowed key is 0, as in every backend; NaN or infinity
    in a key or value that is not allowed may reach other rows, as in the backend ``aten``. Memory grows with
    Sq * Skv.

    Returns:
        A new dict from operator overloads to functions of the same arguments, which may be changed or merged into
        another table. The operators of gradients and ``explain_backend`` are in no such graph and have no entry; those
        over a KV cache have none, since they write into their inputs.
    """
    operators = torch.ops.selfattn
    table: dict[torch._ops.OpOverload, Decomposition] = {
        operators.multihead_attention.default: _multihead_attention,
        operators.multihead_attention_lse.default: _multihead_attention_lse,
        operators.flash_attention.default: _attention,
        operators.qk_norm_rope.default: _qk_norm_rope,
        operators.qk_norm_rope_attention.default: _qk_norm_rope_attention,
        operators.self_attention.default: _self_attention,
        operators.project_query_key_value.default: _project_query_key_value,
        operators.projected_attention.default: _projected_attention,
        operators.segment_ids_from_cu_seqlens.default: _segment_ids_from_cu_seqlens,
    }
    # Written in ATen operators in C++. (``OpOverload.decompose`` would come back to this table.)
    composite = torch.export.default_decompositions()
    for name in (
        "apply_rotary_emb",
        "cu_seqlens_from_segment_ids",
        "merge_attention",
        "precompute_freqs",
        "rope_tables",
        "segment_ids_from_positions",
        "segment_mask",
    ):
        operator = getattr(operators, name).default
        table[operator] = composite[operator]
    return table


def _segment_ids_from_cu_seqlens(cu_seqlens: Tensor, length: int) -> Tensor:
    """Counts the boundaries at or before each token: ONNX has no binary search."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    ids = (cu_seqlens.unsqueeze(0) <= tokens.unsqueeze(1)).sum(1) - 1
    return torch.where(ids < cu_seqlens.shape[0] - 1, ids, -1).to(torch.int32)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _allowed_pairs(
    q: Tensor,
    k: Tensor,
    segment_ids: Tensor | None,
    kv_segment_ids: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    positions: Tensor | None,
    kv_positions: Tensor | None,
) -> Tensor | None:
    """Broadcastable to (B, 1, Sq, Skv); None where all pairs are allowed."""
    q_length, kv_length = q.shape[1], k.shape[1]
    parts = []
    if causal or window_left >= 0 or window_right >= 0:
        if positions is None:
            rows = torch.arange(q_length, device=q.device).unsqueeze(1) + (kv_length - q_length)
            columns = torch.arange(kv_length, device=q.device).unsqueeze(0)
        else:
            rows = positions.to(torch.int64)[:, None, :, None]
            columns = (positions if kv_positions is None else kv_positions).to(torch.int64)[:, None, None, :]
        if causal:
            parts.append(columns <= rows)
        # Differences, so that the widest window overflows nothing.
        if window_left >= 0:
            parts.append(rows - columns <= window_left)
        if window_right >= 0:
            parts.append(columns - rows <= window_right)
    if segment_ids is not None:
        of_queries = segment_ids.to(torch.int64)
        of_keys = of_queries if kv_segment_ids is None else kv_segment_ids.to(torch.int64)
        of_queries, of_keys = of_queries[:, None, :, None], of_keys[:, None, None, :]
        parts.append((of_queries == of_keys) & (of_queries >= 0))
    allowed = None
    for part in parts:
        allowed = part if allowed is None else allowed & part
    return allowed


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    qk_scale: float | None = None,
    *,
    kv_segment_ids: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(q)
    batch_size, q_length, num_heads, head_dim = q.shape
    kv_length, num_kv_heads, group = k.shape[1], k.shape[2], num_heads // k.shape[2]
    scale = head_dim**-0.5 if qk_scale is None else qk_scale
    # The heads of a group beside each other, as rows of one product with their keys: (B, NKV, NH / NKV * Sq, D).
    rows = (q.to(dtype) * scale).permute(0, 2, 1, 3).reshape(batch_size, num_kv_heads, group * q_length, head_dim)
    scores = rows @ k.to(dtype).permute(0, 2, 3, 1)
    scores = scores.reshape(batch_size, num_heads, q_length, kv_length)
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    allowed = _allowed_pairs(
        q, k, segment_ids, kv_segment_ids, causal, window_left, window_right, positions, kv_positions
    )
    if allowed is not None:
        scores = torch.where(allowed, scores, -torch.inf)

    row_max = scores.amax(-1, keepdim=True)
    sink_logits = takes_all = None
    if sinks is not None:
        sink_logits = sinks.to(dtype)[None, :, None, None]
        takes_all = sink_logits == torch.inf  # a sink of +inf takes all the weight, and no part in the sums
        sink_logits = torch.where(takes_all, 0.0, sink_logits)
        row_max = torch.maximum(row_max, sink_logits)
    # A row without an allowed pair: exp(-inf - 0) = 0.
    row_max = torch.where(row_max == -torch.inf, 0.0, row_max)
    weights = torch.exp(scores - row_max)
    row_sum = weights.sum(-1, keepdim=True)
    if sink_logits is not None:
        row_sum = row_sum + torch.exp(sink_logits - row_max)
    is_empty = row_sum == 0
    safe_sum = torch.where(is_empty, 1.0, row_sum)

    weights = (weights / safe_sum).reshape(batch_size, num_kv_heads, group * q_length, kv_length)
    out = (weights @ v.to(dtype).permute(0, 2, 1, 3)).reshape(batch_size, num_heads, q_length, v.shape[3])
    lse = torch.where(is_empty, -torch.inf, torch.log(safe_sum) + row_max)
    if takes_all is not None:
        out, lse = torch.where(takes_all, 0.0, out), torch.where(takes_all, torch.inf, lse)
    return out.permute(0, 2, 1, 3).to(q.dtype).contiguous(), lse.squeeze(-1).to(torch.float32)


def _multihead_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    qk_scale: float | None = None,
    backend: str = "auto",
    **options,
) -> tuple[Tensor, Tensor]:
    return _attention(q, k, v, segment_ids, causal, qk_scale, **options)


def _multihead_attention(*args, **options) -> Tensor:
    return _multihead_attention_lse(*args, **options)[0]


def _rotary_tables(
    x: Tensor, freqs_sin: Tensor | None, freqs_cos: Tensor | None, positions: Tensor | None, theta: float
) -> tuple[Tensor, Tensor]:
    """Each (1 | B, S, 1, R / 2), in the dtype of the computation; R = D where none are given."""
    if freqs_sin is None or freqs_cos is None:
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        # float64: float32 angles lose digits at far positions.
        exponents = torch.arange(0, x.shape[3], 2, dtype=torch.float64, device=x.device) / x.shape[3]
        angles = positions.to(torch.float64).unsqueeze(-1) * torch.pow(theta, -exponents)
        freqs_sin, freqs_cos = torch.sin(angles), torch.cos(angles)
    dtype = _compute_dtype(x)
    return freqs_sin.to(dtype).unsqueeze(2), freqs_cos.to(dtype).unsqueeze(2)


def _rotate(x: Tensor, sin: Tensor, cos: Tensor, pairing: str) -> Tensor:
    """The first R elements of each head, twice as many as the tables have columns."""
    rotary_dim = 2 * sin.shape[3]
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if pairing == "interleaved":
        even, odd = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(3)
    else:
        low, high = rotated.chunk(2, -1)
        rotated = torch.cat((low * cos - high * sin, low * sin + high * cos), -1)
    return torch.cat((rotated, rest), -1) if rest.shape[3] > 0 else rotated


def _qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    freqs_sin: Tensor | None = None,
    freqs_cos: Tensor | None = None,
    *,
    norm: bool = True,
    eps: float = 1e-6,
    rope: bool = True,
    positions: Tensor | None = None,
    theta: float = 10000.0,
    pairing: str = "interleaved",
) -> tuple[Tensor, Tensor]:
    def heads(x: Tensor, weight: Tensor | None) -> Tensor:
        y = x.to(_compute_dtype(x))
        if norm:
            # A positive eps stays positive in float32.
            finfo = torch.finfo(y.dtype)
            bounded = min(max(eps, finfo.tiny), finfo.max) if eps > 0 else eps
            y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + bounded)
            if weight is not None:
                y = y * weight.to(y.dtype)
        if rope:
            y = _rotate(y, *_rotary_tables(x, freqs_sin, freqs_cos, positions, theta), pairing)
        # An operator's result is no view of its input.
        return (y if norm or rope else y.clone()).to(x.dtype).contiguous()

    return heads(q, q_weight), heads(k, k_weight)


def _qk_norm_rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    freqs_sin: Tensor | None = None,
    freqs_cos: Tensor | None = None,
    segment_ids: Tensor | None = None,
    *,
    eps: float = 1e-6,
    theta: float = 10000.0,
    pairing: str = "interleaved",
    causal: bool = True,
    qk_scale: float | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    q, k = _qk_norm_rope(q, k, q_weight, k_weight, freqs_sin, freqs_cos, eps=eps, theta=theta, pairing=pairing)
    return _attention(q, k, v, segment_ids, causal, qk_scale, **options)


def _project_query_key_value(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return linear(x, q_weight, q_bias), linear(x, k_weight, k_bias), linear(x, v_weight, v_bias)


def _projected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    sinks: Tensor | None = None,
    freqs_sin: Tensor | None = None,
    freqs_cos: Tensor | None = None,
    segment_ids: Tensor | None = None,
    *,
    head_dim: int,
    norm_eps: float = 1e-6,
    rope_theta: float = 10000.0,
    rope_pairing: str = "interleaved",
    causal: bool = True,
    qk_scale: float | None = None,
    backend: str = "auto",
    rope: bool = True,
    **options,
) -> Tensor:
    q, k, v = (heads.unflatten(2, (-1, head_dim)) for heads in (q, k, v))
    q, k = _qk_norm_rope(
        q,
        k,
        q_norm_weight,
        k_norm_weight,
        freqs_sin,
        freqs_cos,
        norm=q_norm_weight is not None,
        eps=norm_eps,
        rope=rope,
        theta=rope_theta,
        pairing=rope_pairing,
    )
    attended, _ = _attention(q, k, v, segment_ids, causal, qk_scale, sinks=sinks, **options)
    return attended.flatten(2)


def _self_attention(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    out_weight: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    *layer,
    dropout_rate: float = 0.0,
    training: bool = False,
    **options,
) -> Tensor:
    """``layer`` and ``options``: what _projected_attention takes after q, k and v."""
    projected = _project_query_key_value(x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias)
    out = linear(_projected_attention(*projected, *layer, **options), out_weight, out_bias)
    return dropout(out, dropout_rate) if training and dropout_rate > 0 else out
