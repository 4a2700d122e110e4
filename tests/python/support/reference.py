"""The promise of the operators, slow and obvious, in float64: loops over batch, head and query, no mask algebra.

Written from docs/semantics.md and independent of the library's own backends. Shapes as in selfattn.functional.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def is_allowed(
    query_position: int,
    key_position: int,
    query_id: int,
    key_id: int,
    causal: bool,
    window_left: int,
    window_right: int,
) -> bool:
    """Whether a query may see a key."""
    if query_id != key_id or query_id < 0:
        return False
    if causal and key_position > query_position:
        return False
    if window_left >= 0 and key_position < query_position - window_left:
        return False
    return not (window_right >= 0 and key_position > query_position + window_right)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    qk_scale: float | None = None,
    kv_segment_ids: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, Sq, NH, DV) and lse (B, NH, Sq), differentiable, in float64 on the CPU.

    A sink of -inf is none; one of +inf takes all the weight.
    """
    q, k, v = (tensor.to("cpu", torch.float64) for tensor in (q, k, v))
    sinks = None if sinks is None else sinks.to("cpu", torch.float64)
    batch, num_queries, num_heads, dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    scale = 1 / math.sqrt(dim) if qk_scale is None else qk_scale
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    query_ids = [[0] * num_queries] * batch if segment_ids is None else segment_ids.tolist()
    key_ids = [[0] * num_keys] * batch if kv_segment_ids is None else kv_segment_ids.tolist()
    if positions is None:
        query_positions = [[i + num_keys - num_queries for i in range(num_queries)]] * batch
        key_positions = [list(range(num_keys))] * batch
    else:
        query_positions = positions.tolist()
        key_positions = query_positions if kv_positions is None else kv_positions.tolist()

    outs, lses = [], []
    for b in range(batch):
        for i in range(num_queries):
            keys = [
                j
                for j in range(num_keys)
                if is_allowed(
                    query_positions[b][i],
                    key_positions[b][j],
                    query_ids[b][i],
                    key_ids[b][j],
                    causal,
                    window_left,
                    window_right,
                )
            ]
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                has_sink = sinks is not None and sinks[head] != -math.inf
                logits = scale * (k[b, keys, kv_head] @ q[b, i, head])
                if softcap > 0:
                    logits = softcap * torch.tanh(logits / softcap)
                if (logits == -math.inf).all() or (has_sink and sinks[head] == math.inf):  # no key, or none that counts
                    nothing = v[b, [], kv_head].sum(dim=0)  # of no values: 0
                    outs.append(nothing)
                    lses.append(sinks[head] if has_sink else nothing.sum() - math.inf)
                    continue
                counted = torch.cat([logits, sinks[head : head + 1]]) if has_sink else logits
                lse = torch.logsumexp(counted, dim=0)
                outs.append(torch.exp(logits - lse) @ v[b, keys, kv_head])
                lses.append(lse)
    if not outs:
        return v.new_zeros(batch, num_queries, num_heads, v.shape[-1]), v.new_zeros(batch, num_heads, num_queries)
    out = torch.stack(outs).view(batch, num_queries, num_heads, v.shape[-1])
    return out, torch.stack(lses).view(batch, num_queries, num_heads).transpose(1, 2)


def gradients(result: Tensor, leaves: Sequence[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    """Of ``result`` for each leaf; zeros for a leaf that no allowed pair has brought into it."""
    grad = None if grad is None else grad.to("cpu", torch.float64)
    found = torch.autograd.grad(result, leaves, grad, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=True)]


def rotary_frequencies(dim: int, positions: Tensor, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """sin and cos (B, S, D / 2) of positions (B, S)."""
    angles = torch.zeros(*positions.shape, dim // 2, dtype=torch.float64)
    for index in range(dim // 2):
        angles[..., index] = positions.double() / theta ** (2 * index / dim)
    return angles.sin(), angles.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor, pairing: str = "interleaved") -> Tensor:
    """x (B, S, N, D) with each pair of its first R elements rotated by its angle, written as a product of complex
    numbers, for tables (1 or B, S, R / 2); the other elements stay."""
    x = x.double()
    dim = 2 * sin.shape[-1]
    first = list(range(0, dim, 2)) if pairing == "interleaved" else list(range(dim // 2))
    second = [index + 1 if pairing == "interleaved" else index + dim // 2 for index in first]
    rotated = torch.complex(x[..., first], x[..., second]) * torch.complex(cos.double(), sin.double())[:, :, None]
    out = x.clone()
    out[..., first], out[..., second] = rotated.real, rotated.imag
    return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.double()
    normalised = x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)
    return normalised if weight is None else normalised * weight.double()


def self_attention(
    x: Tensor,
    weights: dict[str, Tensor],
    head_dim: int,
    positions: Tensor | None = None,
    segment_ids: Tensor | None = None,
    norm_eps: float = 1e-6,
    rope_theta: float = 10000.0,
    rope_pairing: str = "interleaved",
    rope: bool = True,
    **attention_options,
) -> Tensor:
    """The module's forward pass (without dropout) from the names of its state dict."""
    x = x.double()
    batch, length, _ = x.shape

    def project(name: str, tensor: Tensor) -> Tensor:
        out = tensor @ weights[f"{name}.weight"].double().T
        return out + weights[f"{name}.bias"].double() if f"{name}.bias" in weights else out

    q, k, v = (project(name, x) for name in ("q_proj", "k_proj", "v_proj"))
    normalises_projections = "q_norm.weight" in weights and len(weights["q_norm.weight"]) == q.shape[-1] != head_dim
    if normalises_projections:
        q, k = (rms_norm(one, weights[f"{name}_norm.weight"], norm_eps) for one, name in ((q, "q"), (k, "k")))
    q, k, v = (projected.view(batch, length, -1, head_dim) for projected in (q, k, v))
    if "q_norm.weight" in weights and not normalises_projections:
        q, k = (rms_norm(one, weights[f"{name}_norm.weight"], norm_eps) for one, name in ((q, "q"), (k, "k")))
    positions = torch.arange(length)[None] if positions is None else positions
    sin, cos = rotary_frequencies(head_dim, positions, rope_theta)
    if rope:
        q, k = rotate(q, sin, cos, rope_pairing), rotate(k, sin, cos, rope_pairing)
    out, _ = attention(q, k, v, segment_ids, sinks=weights.get("sinks"), **attention_options)
    return project("out_proj", out.reshape(batch, length, -1))
