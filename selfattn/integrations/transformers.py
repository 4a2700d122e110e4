"""selfattn as an attention implementation of Hugging Face transformers.

    import selfattn.integrations.transformers
    selfattn.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="selfattn")

Packed documents are kept apart in every forward pass, with a cache and with an attention mask too; docs/integrations.md
says how they are named and what cannot be served.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

import selfattn.integrations._transformers_paged as paged
from selfattn.functional import attention_with_kv_cache, multihead_attention
from selfattn.integrations._transformers_cache import StaticKVCache
from selfattn.integrations._transformers_documents import (
    Sources,
    are_named,
    documents,
    documents_at,
    documents_of_one_query,
    first_keys,
    interval,
)
from selfattn.integrations._transformers_mask import Diagonal, MaskFacts, create_mask, read_mask

__all__ = ["NAME", "StaticKVCache", "attention_forward", "register"]

NAME = "selfattn"

# What some models hand to their attention to change what it computes.
_OTHER_ATTENTION = ("position_bias", "attention_bias", "head_mask", "indices", "block_indices", "sinks", "block_table")


def register() -> None:
    """Makes ``attn_implementation="selfattn"`` known to transformers, continuous batching included.

    Calling it again changes nothing.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, create_mask)
    paged.register(NAME)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention of one layer: what ``AttentionInterface`` calls.

    Args:
        module: the layer's attention module.
        query: (B, NH, Sq, D).
        key: (B, NKV, Skv, D), what the cache gave.
        value: (B, NKV, Skv, DV).
        attention_mask: of ``create_mask``; None for attention in both directions without padding, and in continuous
            batching, where ``write_index``, ``read_index``, ``cu_seq_lens_q``, ``cu_seq_lens_k`` and ``block_table``
            say which keys belong to a token.
        scaling: factor of the logits; None is 1 / sqrt(D).
        dropout: must be 0.
        sliding_window: what the module thinks its window is; the mask decides, and both must agree.
        softcap: as ``multihead_attention``.
        s_aux: (NH,) the sinks of ``multihead_attention``.
        is_causal: None is the module's.
        position_ids: (B | 1, Sq). Documents come from the first of segment_ids, cu_seq_lens_q, seq_idx, position_ids.
        segment_ids: (B | 1, Sq); (B | 1, Skv) where earlier keys come from a cache.
        cu_seq_lens_q: (N + 1,) cumulative lengths, for a batch of 1.
        cu_seq_lens_k: those of the keys, which are the same but in continuous batching.
        seq_idx: as ``segment_ids``.
        kwargs: what else the model's forward was given.

    Returns:
        (B, Sq, NH, DV) and None, in place of the weights.

    Raises:
        NotImplementedError: what cannot be served.
        ValueError: documents of a wrong shape.
    """
    batch = paged.batch_of(cu_seq_lens_q, cu_seq_lens_k, kwargs)
    _refuse(module, dropout, kwargs)
    options = {"qk_scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if batch is not None:
        return paged.attention(q, k, v, batch, paged.window_of(module, sliding_window), options), None
    _check_lengths(cu_seq_lens_q, cu_seq_lens_k)
    sources = Sources(segment_ids, cu_seq_lens_q, seq_idx, position_ids)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is None:
        return _both_directions(q, k, v, sources, is_causal, options), None
    if not is_causal:
        raise NotImplementedError(f"selfattn: {type(module).__name__} is not causal, but came with a causal mask")

    mask = read_mask(attention_mask, q.shape[0], k.shape[1])
    window = module.config.sliding_window if mask.windowed else None
    if sliding_window is not None and mask.diagonal is not Diagonal.ONE_QUERY:
        _check_window(module, sliding_window, window)
    if mask.diagonal is Diagonal.LENGTH and are_named(sources):
        mask = mask.key_by_key(q.shape[1], window)
    if mask.diagonal in (Diagonal.LENGTH, Diagonal.ONE_QUERY):
        return _cached(q, k, v, sources, mask, window, options), None
    if window is not None:
        options["window_left"] = window - 1
    return _causal(q, k, v, sources, mask, options), None


class _Slots(NamedTuple):
    """Which slots of a static cache the queries see."""

    first: Tensor  # (B, Sq)
    lengths: Tensor  # (B,) int32; 0 for a row whose one query sees keys with gaps between them
    draft_mask: Tensor | None  # (B, Sq, Sq), what more than one query see of each other
    gaps: Tensor | None  # (B, Skv) ids of the keys in the rows with gaps, -1 elsewhere; None where no key is padding


def _cached(
    q: Tensor, k: Tensor, v: Tensor, sources: Sources, mask: MaskFacts, window: int | None, options: dict
) -> Tensor:
    """Attention to a cache of which each query sees the slots from its first one to its own."""
    slots = _once(_slots, sources, mask, q, window)
    out = attention_with_kv_cache(
        q,
        k,
        v,
        slots.lengths,
        causal=False,
        positions=slots.first,
        window_left=0,  # of the position, which is the first slot
        draft_mask=slots.draft_mask,
        **options,
    )
    if slots.gaps is None:
        return out
    # Padding between the keys of a row is known on the device alone: each row is 0 in one of the two.
    ids = slots.gaps.new_zeros(q.shape[:2])
    return out + multihead_attention(q, k, v, segment_ids=ids, kv_segment_ids=slots.gaps, causal=False, **options)


def _slots(sources: Sources, mask: MaskFacts, q: Tensor, window: int | None) -> _Slots:
    batch_size, q_length = q.shape[:2]
    if mask.diagonal is Diagonal.ONE_QUERY:
        first, lengths, gaps = interval(documents_of_one_query(sources, batch_size, mask.keys))
        return _Slots(first, lengths, None, gaps)
    first, draft_mask = first_keys(sources, q_length, mask.lengths), None
    if window is not None:
        own = mask.lengths[:, None] + torch.arange(-q_length, 0, device=q.device)
        first = torch.maximum(first, own - (window - 1))
    if q_length > 1:
        draft_mask = torch.ones(q_length, q_length, dtype=torch.bool, device=q.device).tril().expand(batch_size, -1, -1)
    return _Slots(first, mask.lengths, draft_mask, None)


class _Ids(NamedTuple):
    queries: Tensor  # (B, Sq); (B, Skv) where the diagonal is given
    keys: Tensor | None  # (B, Skv); None where they are those of the queries


def _causal(q: Tensor, k: Tensor, v: Tensor, sources: Sources, mask: MaskFacts, options: dict) -> Tensor:
    q_length = q.shape[1]
    if mask.diagonal is Diagonal.TOP_LEFT:
        k, v = k[:, :q_length], v[:, :q_length]
    ids = _once(_ids, sources, mask, q)
    options = {**options, "segment_ids": ids.queries, "kv_segment_ids": ids.keys}
    if mask.diagonal is not Diagonal.GIVEN:
        return multihead_attention(q, k, v, **options)
    # The operator aligns the last query with the last key, and here only the device knows where the queries stand: each
    # is put into the row of its key, in a square where the other rows are padding.
    index = mask.offset + torch.arange(q_length, device=q.device)
    square = q.new_zeros(k.shape[0], k.shape[1], *q.shape[2:]).index_copy(1, index, q)
    return multihead_attention(square, k, v, **options).index_select(1, index)


def _once(compute: Callable, sources: Sources, mask: MaskFacts, q: Tensor, *arguments: object) -> NamedTuple:
    """What ``compute`` gives for one call, computed once for all layers that came with the same tensors."""
    if torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return compute(sources, mask, q, *arguments)
    given = tuple(source for source in sources if source is not None)
    versions = [None if tensor.is_inference() else tensor._version for tensor in (mask.tensor, *given)]
    state = (q.device, q.shape[:2], [id(tensor) for tensor in given], versions)
    known = getattr(mask.tensor, "_selfattn_known", None)
    if known is None or known[0] != state:
        # The tensors are kept with it, so that no other can take their identity.
        known = mask.tensor._selfattn_known = (state, given, compute(sources, mask, q, *arguments))
    return known[2]


def _ids(sources: Sources, mask: MaskFacts, q: Tensor) -> _Ids:
    batch_size, q_length = q.shape[:2]
    if mask.diagonal is Diagonal.GIVEN:
        keys, queries = documents_at(sources, batch_size, q_length, mask.keys, mask.offset)
        return _Ids(queries, keys)
    keys = mask.keys[:, :q_length] if mask.diagonal is Diagonal.TOP_LEFT else mask.keys
    padding = None if mask.diagonal is Diagonal.UNPADDED else keys
    keys = documents(sources, batch_size, q_length, padding, keys.shape[1])
    return _Ids(keys, None) if keys.shape[1] == q_length else _Ids(keys[:, -q_length:], keys)


def _both_directions(q: Tensor, k: Tensor, v: Tensor, sources: Sources, is_causal: bool, options: dict) -> Tensor:
    """Without a mask: the towers of images and sound. position_ids count patches there, not tokens of a document."""
    if is_causal:
        raise NotImplementedError(
            "selfattn: a causal layer came without a mask, so its padding is unknown. Call "
            "selfattn.integrations.transformers.register() before the model runs"
        )
    sources = sources._replace(position_ids=None)
    if any(source is not None for source in sources):
        options = {**options, "segment_ids": documents(sources, q.shape[0], q.shape[1], None, k.shape[1])}
    return multihead_attention(q, k, v, causal=False, **options)


def _check_lengths(queries: Tensor | None, keys: Tensor | None) -> None:
    if keys is not None and (queries is None or queries.shape != keys.shape):
        came = None if queries is None else tuple(queries.shape)
        raise ValueError(
            f"selfattn: cu_seq_lens_k must be the same as cu_seq_lens_q, came as {tuple(keys.shape)} with {came}"
        )


def _check_window(module: nn.Module, sliding_window: int, window: int | None) -> None:
    if window != sliding_window:
        raise NotImplementedError(
            f"selfattn: {type(module).__name__} asks for a window of {sliding_window}, its mask for {window}"
        )


def _refuse(module: nn.Module, dropout: float, kwargs: dict) -> None:
    if dropout:
        raise NotImplementedError(
            f"selfattn: attention dropout must be 0, came as {dropout}: set config.attention_dropout to 0"
        )
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise NotImplementedError(
            'selfattn: output_attentions cannot be served, the weights never exist: use attn_implementation="eager"'
        )
    for name in _OTHER_ATTENTION:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"selfattn: {type(module).__name__} comes with {name}, which cannot be served")
