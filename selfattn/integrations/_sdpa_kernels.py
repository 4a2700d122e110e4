"""PyTorch's flash attention operators over the operators of selfattn: arguments, layouts and results translated.

Each function has the arguments and results of the ATen operator of its name, after ``previous``, which is called with
the same arguments for what selfattn cannot serve. Nothing here depends on the device, and no value of a tensor is read.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Previous = Callable[..., tuple]


class _Pairs(NamedTuple):
    """Which pairs of tokens attend, as options of flash_attention."""

    options: dict
    """segment_ids, kv_segment_ids, causal, window_left, window_right"""
    may_have_empty_rows: bool
    """Whether a query may see no key. Its lse is +inf in PyTorch's contract, and -inf in selfattn's."""


def flash_attention_forward(
    previous: Previous,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others,
) -> tuple:
    """``aten::_flash_attention_forward``: (B, S, H, D) without lengths; (T, H, D) of documents with them, whose lse is
    (H, Tq)."""

    def fall_back() -> tuple:
        return previous(
            query,
            key,
            value,
            cum_seq_q,
            cum_seq_k,
            max_q,
            max_k,
            dropout_p,
            is_causal,
            return_debug_mask,
            scale=scale,
            window_size_left=window_size_left,
            window_size_right=window_size_right,
            **others,
        )

    if any(other is not None for other in others.values()):  # seqused_k, alibi_slopes and what later versions add
        return fall_back()
    try:
        _check_numbers(query, value, dropout_p, return_debug_mask)
        pairs = _pairs(query, key, cum_seq_q, cum_seq_k, is_causal, window_size_left, window_size_right)
        out, lse = _forward(*_rows(cum_seq_q, query, key, value), scale, pairs)
    except NotImplementedError:
        return fall_back()
    if cum_seq_q is not None:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (_laid_out_as(query, out), lse, *_random_state(query))


def flash_attention_backward(
    previous: Previous,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others,
) -> tuple:
    """``aten::_flash_attention_backward``, in the layouts of the forward operator."""

    def fall_back() -> tuple:
        return previous(
            grad_out,
            query,
            key,
            value,
            out,
            logsumexp,
            cum_seq_q,
            cum_seq_k,
            max_q,
            max_k,
            dropout_p,
            is_causal,
            rng_state,
            unused,
            scale=scale,
            window_size_left=window_size_left,
            window_size_right=window_size_right,
            **others,
        )

    if any(other is not None for other in others.values()):
        return fall_back()
    is_ragged = cum_seq_q is not None
    try:
        _check_numbers(query, value, dropout_p, return_debug_mask=False)
        pairs = _pairs(query, key, cum_seq_q, cum_seq_k, is_causal, window_size_left, window_size_right)
        tensors = _rows(cum_seq_q, grad_out, query, key, value, out)
        gradients = _backward(*tensors, logsumexp.unsqueeze(0) if is_ragged else logsumexp, scale, pairs)
    except NotImplementedError:
        return fall_back()
    if is_ragged:
        gradients = tuple(gradient.squeeze(0) for gradient in gradients)
    return tuple(map(_laid_out_as, (query, key, value), gradients))


def scaled_dot_product_flash_attention(
    previous: Previous,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
    **others,
) -> tuple:
    """``aten::_scaled_dot_product_flash_attention``: (B, H, S, D), laid out in memory as the query is."""

    def fall_back() -> tuple:
        return previous(query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale, **others)

    if any(other is not None for other in others.values()):
        return fall_back()
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    try:
        _check_numbers(query, value, dropout_p, return_debug_mask)
        out, lse = _forward(q, k, v, scale, _pairs(q, k, None, None, is_causal, None, None))
    except NotImplementedError:
        return fall_back()
    out = _laid_out_as(query, out.transpose(1, 2))
    return (out, lse, None, None, query.shape[2], key.shape[2], *_random_state(query))


def scaled_dot_product_flash_attention_backward(
    previous: Previous,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
    **others,
) -> tuple:
    """``aten::_scaled_dot_product_flash_attention_backward``: (B, H, S, D)."""

    def fall_back() -> tuple:
        return previous(
            grad_out,
            query,
            key,
            value,
            out,
            logsumexp,
            cum_seq_q,
            cum_seq_k,
            max_q,
            max_k,
            dropout_p,
            is_causal,
            philox_seed,
            philox_offset,
            scale=scale,
            **others,
        )

    if cum_seq_q is not None or cum_seq_k is not None or any(other is not None for other in others.values()):
        return fall_back()
    tensors = tuple(tensor.transpose(1, 2) for tensor in (grad_out, query, key, value, out))
    try:
        _check_numbers(query, value, dropout_p, return_debug_mask=False)
        pairs = _pairs(tensors[1], tensors[2], None, None, is_causal, None, None)
        gradients = _backward(*tensors, logsumexp, scale, pairs)
    except NotImplementedError:
        return fall_back()
    gradients = (gradient.transpose(1, 2) for gradient in gradients)
    return tuple(map(_laid_out_as, (query, key, value), gradients))


IMPLEMENTATIONS = {
    "_flash_attention_forward": flash_attention_forward,
    "_flash_attention_backward": flash_attention_backward,
    "_scaled_dot_product_flash_attention": scaled_dot_product_flash_attention,
    "_scaled_dot_product_flash_attention_backward": scaled_dot_product_flash_attention_backward,
}
"""By the name of the ATen operator."""


def _check_numbers(query: Tensor, value: Tensor, dropout_p: float, return_debug_mask: bool) -> None:
    """What flash_attention has no argument for, and so cannot refuse itself."""
    if dropout_p != 0.0 or return_debug_mask:
        raise NotImplementedError("dropout")
    if value.shape[-1] != query.shape[-1]:
        raise NotImplementedError("a result that is not laid out as the query")


def _pairs(
    query: Tensor,
    key: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    is_causal: bool,
    window_left: int | None,
    window_right: int | None,
) -> _Pairs:
    """Of (B, S, H, D), or of (T, H, D) with lengths.

    Raises:
        NotImplementedError: what segment ids and windows cannot say.
    """
    window_left, window_right = (-1 if w is None or w < 0 else int(w) for w in (window_left, window_right))
    options = {"causal": is_causal, "window_left": window_left, "window_right": window_right}
    is_diagonal = is_causal or window_left >= 0 or window_right >= 0
    if cum_seq_q is None and cum_seq_k is None:
        if query.dim() != 4:
            raise NotImplementedError("rows without a batch")
        return _Pairs(options, is_diagonal and query.shape[1] > key.shape[1])
    if cum_seq_q is None or cum_seq_k is None or query.dim() != 3:
        raise NotImplementedError("lengths of the queries or of the keys alone, or of a batch")
    ids_of = torch.ops.selfattn.segment_ids_from_cu_seqlens.default
    options["segment_ids"] = ids_of(cum_seq_q, query.shape[0]).unsqueeze(0)
    if query.shape[0] == key.shape[0] and _are_same(cum_seq_q, cum_seq_k):
        return _Pairs(options, may_have_empty_rows=False)
    if is_diagonal:
        # Each document's last query would have to meet its last key; flash_attention aligns the ends of the row.
        raise NotImplementedError("a diagonal in each document, of queries and keys that may differ in number")
    options["kv_segment_ids"] = ids_of(cum_seq_k, key.shape[0]).unsqueeze(0)
    return _Pairs(options, may_have_empty_rows=True)


def _are_same(tensor: Tensor, other: Tensor) -> bool:
    """One memory: whether two memories hold equal numbers only the device knows."""
    return tensor is other or (
        tensor.data_ptr() == other.data_ptr()
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
        and tensor.dtype == other.dtype
    )


def _rows(cum_seq_q: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """All documents as one row of a batch of 1."""
    return tensors if cum_seq_q is None else tuple(tensor.unsqueeze(0) for tensor in tensors)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None, pairs: _Pairs) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.selfattn.flash_attention.default(q, k, v, qk_scale=scale, **pairs.options)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf) if pairs.may_have_empty_rows else lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float | None,
    pairs: _Pairs,
) -> tuple[Tensor, Tensor, Tensor]:
    if pairs.may_have_empty_rows:
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    return torch.ops.selfattn.flash_attention_backward.default(
        grad_out, None, q, k, v, out, lse, qk_scale=scale, **pairs.options
    )


def _laid_out_as(like: Tensor, result: Tensor) -> Tensor:
    """The result with the strides that PyTorch's meta kernels promise, those of ``empty_like``: mostly its own."""
    if result.stride() == torch.empty_like(like, device="meta").stride():
        return result
    return torch.empty_like(like).copy_(result)


def _random_state(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The state, the offset and the debug mask of a call without dropout, which nobody reads."""
    return (
        torch.empty(2, dtype=torch.uint64, device=query.device),
        torch.empty((), dtype=torch.uint64, device=query.device),
        torch.empty(0, dtype=query.dtype, device=query.device),
    )
