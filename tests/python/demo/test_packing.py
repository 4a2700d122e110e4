"""Packing keeps every byte once, in its document, with the right target, position and id."""

import torch
from documents import entropy_of_bytes, split_into_documents
from hypothesis import given
from hypothesis import strategies as st
from packing import BOUNDARY, IGNORED_TARGET, PADDING_ID, PackedRows, pack

ROW_LENGTH = 16
documents_of_bytes = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=30)


def unpack(rows: PackedRows) -> list[tuple[list[int], list[int], list[int]]]:
    """tokens, targets and positions of every document."""
    found = []
    for row in range(len(rows)):
        for number in range(int(rows.segment_ids[row].max()) + 1):
            tokens = rows.segment_ids[row] == number
            found.append(tuple(field[row][tokens].tolist() for field in (rows.tokens, rows.targets, rows.positions)))
    return found


@given(documents_of_bytes, st.integers(0, 100))
def test_every_piece_of_every_document_is_there_once(documents: list[bytes], seed: int) -> None:
    rows = pack(documents, ROW_LENGTH, seed)
    width = ROW_LENGTH - 1
    pieces = [document[i : i + width] for document in documents for i in range(0, len(document), width)]
    found = unpack(rows)
    assert sorted(bytes(tokens[1:]) for tokens, _, _ in found) == sorted(pieces)
    for tokens, targets, positions in found:
        assert tokens[0] == BOUNDARY
        assert targets == [*tokens[1:], BOUNDARY]
        assert positions == list(range(len(tokens)))


@given(documents_of_bytes, st.integers(0, 100))
def test_padding_has_no_document_and_no_target(documents: list[bytes], seed: int) -> None:
    rows = pack(documents, ROW_LENGTH, seed)
    padding = rows.segment_ids == PADDING_ID
    assert torch.equal(padding, rows.targets == IGNORED_TARGET)
    assert (rows.segment_ids[~padding] >= 0).all()
    assert rows.tokens.shape[1] == ROW_LENGTH


@given(documents_of_bytes, st.integers(0, 100))
def test_same_seed_gives_the_same_rows(documents: list[bytes], seed: int) -> None:
    assert torch.equal(pack(documents, ROW_LENGTH, seed).tokens, pack(documents, ROW_LENGTH, seed).tokens)


def test_short_documents_share_rows() -> None:
    rows = pack([b"abc"] * 100, ROW_LENGTH, seed=0)  # four tokens each
    assert len(rows) == 25 and rows.fill() == 1.0 and rows.documents_per_row() == 4.0


def test_python_source_is_split_into_functions_and_methods() -> None:
    source = (
        b"import a\n\n\ndef f():\n    x\n\n    y\n\n\nclass A:\n    z = 1\n\n    @p\n    def g(self):\n        pass\n"
    )
    assert split_into_documents(source) == [
        b"import a\n",
        b"def f():\n    x\n\n    y\n",
        b"class A:\n    z = 1\n",
        b"    @p\n    def g(self):\n        pass\n\n",
    ]


def test_entropy_of_equal_frequencies_is_the_logarithm() -> None:
    assert entropy_of_bytes([b"ab", b"cd"]) == 2.0
