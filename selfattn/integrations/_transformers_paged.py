"""Continuous batching of transformers: all tokens of a step in one row, keys and values in pages.

transformers hands a layer one of two things. Where every sequence has one new token, the pages and their table: the
layer writes the new keys itself (the decode path). Else it writes them, and gathers the keys of every sequence one
behind the other (the varlen path).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching import cache as cb_cache
from transformers.generation.continuous_batching import continuous_api as cb_api
from transformers.generation.continuous_batching import initialization as cb_initialization
from transformers.utils.generic import is_flash_attention_requested

from selfattn.functional import (
    append_kv_cache,
    attention_with_kv_cache,
    multihead_attention,
    segment_ids_from_cu_seqlens,
)

_PAGE = 16  # slots of the pages that gathered keys are put into: the smallest that flash takes
_ensure_decode_path = cb_initialization.ensure_decode_fast_path_is_available


class Batch(NamedTuple):
    """What continuous batching tells a layer. R sequences, T tokens."""

    cu_seq_lens_q: Tensor  # (R + 1,) int32
    cu_seq_lens_k: Tensor  # (R + 1,) int32, keys with those of the new tokens
    max_length_k: int
    read_index: list[Tensor]  # empty tensors where no sequence has earlier keys
    block_table: Tensor | None  # (R, pages of a row) int32, on the decode path
    k_cache: Tensor | None  # (P, page_size, NKV, D), likewise
    v_cache: Tensor | None


def register(name: str) -> None:
    """Lets ``generate_batch`` take the implementation ``name`` as it takes flash attention: no mask, pages, ragged.

    transformers knows by their names which implementations are such, so three of its modules get another answer.
    """

    def takes_no_mask(config=None, requested_attention_implementation=None, version=None) -> bool:
        asked = requested_attention_implementation if config is None else config._attn_implementation
        return asked == name or is_flash_attention_requested(config, requested_attention_implementation, version)

    def ensure_decode_path(config, cb_config, user_requested) -> None:
        pages = all(
            cb_cache.ATTN_TYPE_TO_ALLOCATOR[kind].supports_block_table
            for kind in cb_cache.group_layers_by_attn_type(config)
        )
        if config._attn_implementation != name or not pages:
            _ensure_decode_path(config, cb_config, user_requested)

    for module in (cb_api, cb_cache, cb_initialization):
        module.is_flash_attention_requested = takes_no_mask
    cb_initialization.ensure_decode_fast_path_is_available = ensure_decode_path


def batch_of(cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None, kwargs: dict) -> Batch | None:
    """What a layer's arguments say, or None outside of continuous batching. Takes ``block_table`` out of them."""
    if kwargs.get("write_index") is None:
        return None
    pages = kwargs.pop("block_table"), kwargs.get("k_cache"), kwargs.get("v_cache")
    return Batch(cu_seq_lens_q, cu_seq_lens_k, kwargs["max_length_k"], kwargs["read_index"], *pages)


def window_of(module: nn.Module, sliding_window: int | None) -> int | None:
    """The window of a layer: there is no mask that says it, and not every module does."""
    sliding = cb_cache.group_layers_by_attn_type(module.config).get("sliding_attention", ())
    own = module.config.sliding_window if module.layer_idx in sliding else None
    if sliding_window is not None and sliding_window != own:
        raise NotImplementedError(
            f"selfattn: {type(module).__name__} asks for a window of {sliding_window}, its pages are for {own}"
        )
    return own


def attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, window: int | None, options: dict) -> Tensor:
    """Attention of one layer to the keys of its sequences.

    Args:
        q: (1, T, NH, D).
        k: (1, T, NKV, D) the new keys; (1, all keys, NKV, D) on the varlen path with earlier keys.
        v: (1, as k, NKV, D).
        batch: the sequences.
        window: of the layer.
        options: of the operators.

    Returns:
        (1, T, NH, D); 0 for padding.
    """
    options = {**options, "window_left": -1 if window is None else window - 1}
    if batch.block_table is not None:
        return _decode(q, k, v, batch, options)
    ids = segment_ids_from_cu_seqlens(batch.cu_seq_lens_q, q.shape[1])[None]
    if all(index.numel() == 0 for index in batch.read_index):
        return multihead_attention(q, k, v, segment_ids=ids, **options)
    lengths, page_table, index = _pages(batch, k.shape[1])
    k, v = (keys[0].index_select(0, index).unflatten(0, (-1, _PAGE)) for keys in (k, v))
    return attention_with_kv_cache(q, k, v, lengths, page_table, ids, **options)


def _decode(q: Tensor, k: Tensor, v: Tensor, batch: Batch, options: dict) -> Tensor:
    """One token of each sequence, and a sequence without keys is padding."""
    lengths = batch.cu_seq_lens_k.diff()
    if q.shape[1] != lengths.shape[0]:
        raise ValueError(
            f"selfattn: block_table is for one new token of each sequence, {lengths.shape[0]}, came with {q.shape[1]}"
        )
    q, k, v = (heads.transpose(0, 1) for heads in (q, k, v))
    rows = torch.arange(lengths.shape[0], dtype=torch.int32, device=q.device)
    ids = torch.where(lengths > 0, rows, -1)[:, None]
    positions = (lengths - 1).clamp(min=0)[:, None]
    append_kv_cache(k, v, positions, batch.k_cache, batch.v_cache, batch.block_table, ids)
    out = attention_with_kv_cache(q, batch.k_cache, batch.v_cache, lengths, batch.block_table, ids, **options)
    return out.transpose(0, 1)


def _pages(batch: Batch, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gathered keys begin anywhere, and a page is read from its beginning: where each slot of such pages finds its key.

    Returns:
        lengths (R,), page_table (R, pages of a row), and (all slots,) int64, the key of each slot. Nobody reads the
        slots behind a sequence's last key.
    """
    begins, lengths = batch.cu_seq_lens_k[:-1], batch.cu_seq_lens_k.diff()
    num_rows = lengths.shape[0]
    ends = ((lengths + _PAGE - 1) // _PAGE).cumsum(0)  # in pages, of which no row wastes more than one
    num_pages = -(-num_keys // _PAGE) + num_rows
    first_page = torch.nn.functional.pad(ends[:-1], (1, 0))
    columns = torch.arange(-(-batch.max_length_k // _PAGE), device=lengths.device)
    slots = torch.arange(num_pages * _PAGE, device=lengths.device)
    row = torch.searchsorted(ends, slots // _PAGE, right=True).clamp(max=num_rows - 1)
    index = begins[row] + slots - first_page[row] * _PAGE
    return lengths, first_page[:, None] + columns, index.clamp(0, num_keys - 1)
