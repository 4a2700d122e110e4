"""The segment converters and the mask do what their words say, on any ids, and lead back to where they came from."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import segment_ids

import selfattn

lengths_of_documents = st.lists(st.integers(1, 6), min_size=1, max_size=8)


@given(segment_ids())
def test_mask_is_equal_and_not_negative(ids: torch.Tensor) -> None:
    mask = selfattn.segment_mask(ids)
    batch, length = ids.shape
    assert mask.dtype == torch.bool and mask.shape == (batch, 1, length, length)
    rows = ids.tolist()
    assert mask.tolist() == [[[[a == b and a >= 0 for b in row] for a in row]] for row in rows]


@given(segment_ids(max_length=8), st.integers(1, 9))
def test_mask_between_two_rows_of_ids(ids: torch.Tensor, num_keys: int) -> None:
    keys = torch.randint(-1, 3, (ids.shape[0], num_keys))
    expected = [
        [[[a == b and a >= 0 for b in ks] for a in qs]] for qs, ks in zip(ids.tolist(), keys.tolist(), strict=True)
    ]
    assert selfattn.segment_mask(ids, keys).tolist() == expected


@given(lengths_of_documents, st.sampled_from([torch.int32, torch.int64]))
def test_positions_give_a_number_a_document(lengths: list[int], dtype: torch.dtype) -> None:
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(dtype)
    ids = selfattn.segment_ids_from_positions(positions)
    assert ids.dtype == torch.int32
    assert ids.tolist() == [[number for number, n in enumerate(lengths) for _ in range(n)]]


def test_document_that_starts_inside_a_longer_one_is_continued() -> None:
    # A row may begin in the middle of a document; only a break in the count starts another.
    assert selfattn.segment_ids_from_positions(torch.tensor([[7, 8, 0, 1, 5]])).tolist() == [[0, 0, 1, 1, 2]]


@given(lengths_of_documents, st.integers(0, 5), st.sampled_from([torch.int32, torch.int64]))
def test_cumulative_lengths_give_ids_and_padding(lengths: list[int], padding: int, dtype: torch.dtype) -> None:
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    ids = selfattn.segment_ids_from_cu_seqlens(boundaries, sum(lengths) + padding)
    assert ids.dtype == torch.int32
    assert ids.tolist() == [number for number, n in enumerate(lengths) for _ in range(n)] + [-1] * padding


def test_empty_documents_between_boundaries_take_no_token() -> None:
    assert selfattn.segment_ids_from_cu_seqlens(torch.tensor([0, 2, 2, 3]), 4).tolist() == [0, 0, 2, -1]


@given(segment_ids(), st.integers(0, 3))
def test_ids_give_the_boundaries_of_their_runs(ids: torch.Tensor, spare: int) -> None:
    rows = ids.tolist()
    starts = [[i for i, value in enumerate(row) if i == 0 or row[i - 1] != value] for row in rows]
    max_segments = max(map(len, starts)) + spare
    boundaries = selfattn.cu_seqlens_from_segment_ids(ids, max_segments)
    assert boundaries.dtype == torch.int32
    length = ids.shape[1]
    assert boundaries.tolist() == [start + [length] * (max_segments + 1 - len(start)) for start in starts]


@given(lengths_of_documents)
def test_round_trip_of_boundaries(lengths: list[int]) -> None:
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = selfattn.segment_ids_from_cu_seqlens(boundaries, sum(lengths))
    assert torch.equal(selfattn.cu_seqlens_from_segment_ids(ids[None], len(lengths))[0], boundaries)


@given(lengths_of_documents)
def test_positions_and_boundaries_agree(lengths: list[int]) -> None:
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])
    assert torch.equal(
        selfattn.segment_ids_from_positions(positions[None])[0],
        selfattn.segment_ids_from_cu_seqlens(boundaries, sum(lengths)),
    )


def test_empty_batches_and_rows() -> None:
    for shape in ((0, 4), (2, 0)):
        ids = torch.zeros(shape, dtype=torch.int32)
        assert selfattn.segment_mask(ids).shape == (shape[0], 1, shape[1], shape[1])
        assert selfattn.segment_ids_from_positions(ids).shape == shape
        assert selfattn.cu_seqlens_from_segment_ids(ids, 3).tolist() == [[0, 0, 0, 0]] * (2 if shape[0] else 0)
    assert selfattn.segment_ids_from_cu_seqlens(torch.tensor([0]), 3).tolist() == [-1, -1, -1]
    assert selfattn.segment_ids_from_cu_seqlens(torch.tensor([0]), 0).shape == (0,)
