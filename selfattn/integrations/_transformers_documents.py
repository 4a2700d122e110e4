"""Which tokens of a row belong together, from what a model hands to its attention.

The values stay on the device. Ids are those of ``multihead_attention``: equal ones attend to each other, negative ones
are padding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from selfattn.functional import segment_ids_from_cu_seqlens, segment_ids_from_positions


class Sources(NamedTuple):
    """What names the documents. The first that is given counts."""

    segment_ids: Tensor | None = None  # (B | 1, Sq), or (B | 1, Skv) where earlier keys come from a cache
    cu_seq_lens_q: Tensor | None = None  # (N + 1,), for a batch of 1
    seq_idx: Tensor | None = None  # as segment_ids
    position_ids: Tensor | None = None  # (B | 1, Sq); a document starts where it is not its left neighbour's + 1


def documents(sources: Sources, batch_size: int, q_length: int, keys: Tensor | None, kv_length: int) -> Tensor:
    """The ids of all keys, the last Sq of which are the queries.

    Args:
        sources: what the model was given.
        batch_size: B.
        q_length: Sq.
        keys: (B, Skv) int32, -1 for padding; None if no key is padding.
        kv_length: Skv.

    Returns:
        (B, Skv) int32 or int64 ids.
    """
    ids = _named(sources, batch_size, q_length, kv_length)
    if ids is None:
        positions = _positions(sources.position_ids, batch_size, q_length)
        ids = _from_positions(positions, keys, kv_length)
    return ids if keys is None else torch.where(keys < 0, -1, ids)


def documents_at(
    sources: Sources, batch_size: int, q_length: int, keys: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``documents`` where the queries stand at keys d .. d + Sq - 1, and d is a number on the device.

    Returns:
        (B, Skv) ids of the keys, and (B, Skv) ids of the queries, each at its key's place, -1 elsewhere.
    """
    kv_length = keys.shape[1]
    index = offset + torch.arange(q_length, device=keys.device)
    ids = _named(sources, batch_size, q_length, kv_length)
    if ids is None:
        positions = _positions(sources.position_ids, batch_size, q_length)
        real = (keys >= 0).index_select(1, index)
        before = torch.arange(kv_length, device=keys.device) < offset
        cached = _continued(positions, real, (keys >= 0) & before)
        ids = cached.index_copy(1, index, _runs(positions, real))
    ids = torch.where(keys < 0, -1, ids)
    return ids, torch.full_like(ids, -1).index_copy(1, index, ids.index_select(1, index))


def documents_of_one_query(sources: Sources, batch_size: int, keys: Tensor) -> Tensor:
    """The ids of the keys of one query, whose own id is 0: 0 or -1.

    ``keys`` (B, Skv) is 0 for the keys that the query sees, of which it is the last itself, and -1 for the others.
    """
    ids = _named(sources, batch_size, 1, keys.shape[1])
    if ids is not None:
        index = torch.arange(keys.shape[1], device=keys.device)
        itself = torch.where(keys < 0, -1, index).argmax(1, keepdim=True)
        return torch.where(ids == ids.gather(1, itself), keys, -1)
    positions = _positions(sources.position_ids, batch_size, 1)
    rank = (keys >= 0).cumsum(1) - 1
    return torch.where(rank < rank[:, -1:] - positions, -1, keys)


def are_named(sources: Sources) -> bool:
    """Whether documents are given key by key, and not by positions alone."""
    return any(source is not None for source in sources[:3])


def first_keys(sources: Sources, q_length: int, lengths: Tensor) -> Tensor:
    """(B, Sq) int64: where the document of each query begins among the keys, of which the queries are the last.

    Args:
        sources: positions alone.
        q_length: Sq.
        lengths: (B,) int32, the keys, none of which is padding.
    """
    positions = _positions(sources.position_ids, lengths.shape[0], q_length)
    runs = segment_ids_from_positions(positions).contiguous()
    inside = torch.searchsorted(runs, runs)  # where the run of each query begins among the queries
    first = lengths[:, None] - q_length
    return (first + torch.where(runs == 0, -positions[:, :1], inside)).clamp(min=0)


def interval(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One interval of keys for each row, and the rest.

    Args:
        keys: (B, Skv), 0 for the keys that a row's query sees, else -1.

    Returns:
        (B, 1) int64, the first key, and (B,) int32, one past the last, 0 for a row whose keys have gaps; and ``keys``
        with -1 in every other row.
    """
    seen = keys >= 0
    index = torch.arange(1, keys.shape[1] + 1, device=keys.device)
    first = seen.to(torch.int32).argmax(1, keepdim=True)
    end = torch.where(seen, index, 0).amax(1, keepdim=True)
    whole = seen.sum(1, keepdim=True) == end - first
    return first, torch.where(whole, end, 0)[:, 0].to(torch.int32), torch.where(whole, -1, keys)


def _named(sources: Sources, batch_size: int, q_length: int, kv_length: int) -> Tensor | None:
    """(B, Skv) ids that the caller gave by name, or None."""
    name, given = "segment_ids", sources.segment_ids
    if given is None and sources.cu_seq_lens_q is not None:
        name, given = "cu_seq_lens_q", _from_lengths(sources.cu_seq_lens_q, batch_size, q_length)
    if given is None:
        name, given = "seq_idx", sources.seq_idx
    if given is None:
        return None
    if given.dim() != 2 or given.shape[0] not in (1, batch_size) or given.shape[1] != kv_length:
        cached = "" if q_length == kv_length else f", {kv_length - q_length} of them from a cache"
        raise ValueError(
            f"selfattn: {name} must name the documents of all keys, ({batch_size}, {kv_length}){cached}; "
            f"came as {tuple(given.shape)}"
        )
    return given.expand(batch_size, -1)


def _from_lengths(cu_seq_lens: Tensor, batch_size: int, q_length: int) -> Tensor:
    if batch_size != 1 or cu_seq_lens.dim() != 1:
        raise ValueError(
            f"selfattn: cu_seq_lens_q must be (N + 1,) for a batch of one row, came as {tuple(cu_seq_lens.shape)} for "
            f"{batch_size} rows; give segment_ids instead"
        )
    return segment_ids_from_cu_seqlens(cu_seq_lens, q_length)[None]


def _positions(position_ids: Tensor | None, batch_size: int, q_length: int) -> Tensor:
    if position_ids is None:
        raise ValueError(
            "selfattn: this model hands no position_ids to its attention, so packed documents cannot be told apart: "
            "give segment_ids (B, S) to the model's forward, zeros for rows of one document"
        )
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch_size) or position_ids.shape[1] != q_length:
        raise ValueError(
            f"selfattn: position_ids must be (1 | {batch_size}, {q_length}) to tell documents, came as "
            f"{tuple(position_ids.shape)}; give segment_ids as well"
        )
    return position_ids.expand(batch_size, -1)


def _from_positions(positions: Tensor, keys: Tensor | None, kv_length: int) -> Tensor:
    """(B, Skv) ids. The last tokens are those of ``positions``, those before them come from a cache."""
    q_length = positions.shape[1]
    cached_length = kv_length - q_length
    new = _runs(positions, None if keys is None else keys[:, cached_length:] >= 0)
    if cached_length == 0:
        return new
    real = None if keys is None else keys >= 0
    cached = (
        torch.ones(1, cached_length, dtype=torch.bool, device=positions.device)
        if real is None
        else real[:, :cached_length]
    )
    return torch.cat([_continued(positions, None if real is None else real[:, cached_length:], cached), new], dim=1)


def _runs(positions: Tensor, real: Tensor | None) -> Tensor:
    """(B, Sq) int32: 0 for the first document among these tokens, then 1, 2, ...

    Padding inside a document does not end it: a position is compared with that of the last real token.
    """
    if real is None:
        return segment_ids_from_positions(positions)
    index = torch.arange(positions.shape[1], device=positions.device)
    last = torch.where(real, index, -1).cummax(1).values
    previous = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    expected = positions.gather(1, previous.clamp(min=0)) + 1
    return (real & (previous >= 0) & (positions != expected)).cumsum(1).to(torch.int32)


def _continued(positions: Tensor, real: Tensor | None, cached: Tensor) -> Tensor:
    """(B, columns of cached) int32: 0 for the cached tokens whose document the first new token continues, else -1.

    A token at position p of its document has p tokens of the document before it, so the document starts at the p-th
    real token from the end of the cache. ``cached`` (B | 1, n) bool: which columns are real tokens before the new ones.
    """
    first = positions[:, :1] if real is None else positions.gather(1, real.to(torch.int32).argmax(1, keepdim=True))
    rank = cached.cumsum(1)  # from 1, so that the last is their number
    return torch.where(rank - 1 < rank[:, -1:] - first, -1, 0).to(torch.int32)
