"""Promise: a context layout deals every token of a row to one rank, in the order that it says, evenly, and splits no
more documents than it must; all of it in one process, as the operator ``context_layout`` gives it to each rank."""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import selfattn  # noqa: F401  (registers the operators)

BALANCES = ("documents", "head_tail", "contiguous")


class Shard(NamedTuple):
    """One rank's layout."""

    indices: Tensor
    segment_ids: Tensor
    positions: Tensor
    document_positions: Tensor
    kv_segment_ids: Tensor
    kv_positions: Tensor
    kv_order: Tensor
    slots: Tensor
    shared: int
    local_start: int
    documents_are_runs: bool


def lay_out(ids: Tensor, ranks: int, balance: str = "documents", bucket: int = 128) -> list[Shard]:
    make = torch.ops.selfattn.context_layout
    return [Shard(*make(ids, rank, ranks, balance, bucket)) for rank in range(ranks)]


@st.composite
def batches(draw: st.DrawFn) -> Tensor:
    """Ids of any order, or of documents, with padding."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    values = st.lists(st.integers(-2, draw(st.integers(0, 8))), min_size=length, max_size=length)
    drawn = [draw(values) for _ in range(rows)]
    if draw(st.booleans()):
        drawn = [sorted(row, key=lambda number: number % 9) for row in drawn]
    return torch.tensor(drawn, dtype=draw(st.sampled_from([torch.int32, torch.int64])))


def expected_order(row: list[int], tokens: list[int], split: set[int]) -> list[int]:
    """Split documents, then whole ones, each by their first tokens, then padding."""
    first = {number: row.index(number) if number >= 0 else 0 for number in set(row)}
    kinds = {number: 2 if number < 0 else number not in split for number in set(row)}
    return sorted(tokens, key=lambda token: (kinds[row[token]], first[row[token]], token))


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(1, 6), st.sampled_from(BALANCES), st.sampled_from([1, 4, 128]))
def test_every_token_has_its_slot(ids: Tensor, ranks: int, balance: str, bucket: int) -> None:
    shards = lay_out(ids, ranks, balance, bucket)
    length = ids.shape[1]
    slots = -(-length // ranks)
    shared, splits = shards[0].shared, []
    for b, row in enumerate(ids.tolist()):
        own = [[token for token in shard.indices[b].tolist() if token >= 0] for shard in shards]
        assert sorted(itertools.chain(*own)) == list(range(length))
        holders = {number: {rank for rank in range(ranks) if number in (row[t] for t in own[rank])} for number in row}
        split = {number for number in row if number >= 0 and len(holders[number]) > 1}
        counts = [sum(row[token] in split for token in tokens) for tokens in own]
        splits.append(counts)
        numbers = {number: i for i, number in enumerate(dict.fromkeys(number for number in row if number >= 0))}
        gathered = [own[rank][slot] if slot < counts[rank] else -1 for rank in range(ranks) for slot in range(shared)]
        known = sorted((numbers[row[token]], token) for token in gathered if token >= 0)
        order = shards[0].kv_order[b].tolist()
        assert sorted(order) == list(range(ranks * shared))
        assert [gathered[place] for place in order] == [t for _, t in known] + [-1] * (len(order) - len(known))
        for rank, (shard, tokens) in enumerate(zip(shards, own, strict=True)):
            assert shard.indices[b].tolist() == expected_order(row, tokens, split) + [-1] * (slots - len(tokens))
            ids_of_slots = [row[token] for token in tokens] + [-1] * (slots - len(tokens))
            assert shard.segment_ids[b].tolist() == ids_of_slots
            assert shard.positions[b].tolist() == tokens + [0] * (slots - len(tokens))
            earlier = [0 if row[token] < 0 else row[:token].count(row[token]) for token in tokens]
            assert shard.document_positions[b].tolist() == earlier + [0] * (slots - len(tokens))
            travels = range(min(shared, len(tokens)))
            kv_ids = [numbers[row[tokens[slot]]] if slot < counts[rank] else -1 for slot in travels]
            kv_positions = [tokens[slot] for slot in travels]
            padding = shared - len(travels)
            for other in shards:
                part = slice(rank * shared, (rank + 1) * shared)
                assert other.kv_segment_ids[b, part].tolist() == kv_ids + [-1] * padding
                assert other.kv_positions[b, part].tolist() == kv_positions + [0] * padding
                assert torch.equal(other.kv_order, shards[0].kv_order)
            assert shards[0].slots[b, tokens].tolist() == [rank * slots + slot for slot in range(len(tokens))]
    most = max(map(max, splits))
    assert {shard.shared for shard in shards} == {min(slots, -(-most // bucket) * bucket)}
    for rank, shard in enumerate(shards):
        is_whole = (shard.segment_ids >= 0) & (torch.arange(slots) >= torch.tensor([s[rank] for s in splits])[:, None])
        assert not is_whole[:, : shard.local_start].any()
        assert shard.local_start == shared or is_whole[:, : shard.local_start + bucket].any()
        assert shard.segment_ids.dtype == shard.kv_segment_ids.dtype == torch.int32
    runs = [sum(a != b for a, b in zip([None, *row], row, strict=False) if b >= 0) for row in ids.tolist()]
    numbers = [len({number for number in row if number >= 0}) for row in ids.tolist()]
    assert shards[0].documents_are_runs == (runs == numbers)


@pytest.mark.parametrize(("ranks", "length"), [(2, 10), (3, 20), (4, 16), (5, 13), (5, 3)])
def test_names_say_which_tokens(ranks: int, length: int) -> None:
    ids = torch.zeros(1, length, dtype=torch.int32)
    for rank, shard in enumerate(lay_out(ids, ranks, "contiguous")):
        held = list(range(rank * length // ranks, (rank + 1) * length // ranks))
        assert [token for token in shard.indices[0].tolist() if token >= 0] == held
    row = list(range(length))
    for rank, shard in enumerate(lay_out(ids, ranks, "head_tail")):
        share = (rank + 1) * length // ranks - rank * length // ranks
        tail = len(row) - share // 2
        assert [token for token in shard.indices[0].tolist() if token >= 0] == row[: share - share // 2] + row[tail:]
        row = row[share - share // 2 : tail]
    assert not row


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_balance_and_how_little_is_split(ranks: int, seed: int) -> None:
    """Documents of at most S / 4n, exponential lengths."""
    length, generator = 16384, torch.Generator().manual_seed(seed)
    lengths = torch.empty(200).exponential_(1 / 900, generator=generator).long().clamp(1, length // (4 * ranks))
    ids = torch.repeat_interleave(torch.arange(200), lengths)[:length]
    ids = torch.nn.functional.pad(ids, (0, length - len(ids)), value=200)[None]
    shards = lay_out(ids, ranks)
    pairs = torch.tensor([(shard.document_positions + 1)[shard.segment_ids >= 0].sum().item() for shard in shards])
    assert pairs.double().mean() / pairs.max() >= 0.9
    assert shards[0].shared <= length // ranks // 4


def test_one_document_is_dealt_head_to_tail() -> None:
    shards = lay_out(torch.zeros(1, 8192, dtype=torch.int32), 4)
    assert [shard.positions[0, ::1024].tolist() for shard in shards] == [
        [0, 7168],
        [1024, 6144],
        [2048, 5120],
        [3072, 4096],
    ]
    assert [(shard.shared, shard.local_start) for shard in shards] == [(2048, 2048)] * 4


def test_documents_that_fit_are_never_split() -> None:
    ids = torch.arange(8).repeat_interleave(64)[None]
    for ranks in (1, 2, 4, 8):
        assert {(shard.shared, shard.local_start) for shard in lay_out(ids, ranks)} == {(0, 0)}


def test_a_thousand_ranks() -> None:
    """More than documents, and than tokens."""
    ids = torch.arange(5).repeat_interleave(100)[None]
    shard = Shard(*torch.ops.selfattn.context_layout(ids, 1023, 1024))
    assert shard.indices.tolist() == [[-1]]
    assert len(set(shard.slots[0].tolist())) == 500
    assert shard.slots.min() >= 0 and shard.slots.max() < 1024


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(1, 4), 0, 2), TypeError, "segment_ids must be int32 or int64"),
        ((torch.zeros(4, dtype=torch.int32), 0, 2), ValueError, r"segment_ids must have two dimensions"),
        ((torch.tensor([[0, 2**31]]), 0, 2), ValueError, "segment_ids must hold values that fit in int32"),
        ((torch.zeros(1, 0, dtype=torch.int32), 0, 2), ValueError, "segment_ids must have rows of at least 1 token"),
        ((torch.zeros(1, 4, dtype=torch.int32, device="meta"), 0, 2), TypeError, "must be a plain tensor on the CPU"),
        ((torch.zeros(1, 4, dtype=torch.int32), 0, 0), ValueError, "group_size must be from 1"),
        ((torch.zeros(1, 4, dtype=torch.int32), 2, 2), ValueError, "group_rank must be at least 0 and below"),
        ((torch.zeros(1, 4, dtype=torch.int32), 0, 2, "zigzag"), ValueError, "balance must be one of"),
        ((torch.zeros(1, 4, dtype=torch.int32), 0, 2, "documents", 0), ValueError, "bucket must be at least 1"),
    ],
)
def test_bad_arguments(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch.ops.selfattn.context_layout(*arguments)
