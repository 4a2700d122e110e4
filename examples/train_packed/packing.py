"""Packs documents of any length into rows of S tokens: the data that segment ids describe."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BOUNDARY = 256
"""The one token that is no byte: it opens a document, and it is what follows the last byte."""
VOCABULARY = 257
IGNORED_TARGET = -100
PADDING_ID = -1
OPEN_ROWS = 64


@dataclass(frozen=True)
class PackedRows:
    """Rows of packed documents, each field (rows, S)."""

    tokens: Tensor
    targets: Tensor
    """The next token of the same document; IGNORED_TARGET on padding."""
    segment_ids: Tensor
    """Which document of its row a token belongs to; PADDING_ID on padding."""
    positions: Tensor
    """A token's position in its document."""
    context: Any = None
    """The ContextLayout of whole rows of which these are one rank's tokens (parallel.py)."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows) -> "PackedRows":
        return PackedRows(*(field[rows] for field in self._tensors()))

    def to(self, device: torch.device) -> "PackedRows":
        return PackedRows(*(field.to(device, non_blocking=True) for field in self._tensors()), self.context)

    def fill(self) -> float:
        """Share of the tokens that are no padding."""
        return (self.segment_ids != PADDING_ID).float().mean().item()

    def documents_per_row(self) -> float:
        return (self.segment_ids.amax(dim=1) + 1).float().mean().item()

    def count_targets(self) -> int:
        """Tokens whose loss counts."""
        return int((self.targets != IGNORED_TARGET).sum())

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.tokens, self.targets, self.segment_ids, self.positions


def pack(documents: list[bytes], row_length: int, seed: int) -> PackedRows:
    """Every byte of every document, in a random order of the documents.

    A document longer than a row is cut into pieces, each a document of its own. Each piece goes into the fullest of
    the open rows that still has room for it (best fit); where none has, the fullest row is closed.
    """
    pieces = [
        document[start : start + row_length - 1]
        for document in documents
        for start in range(0, len(document), row_length - 1)
    ]
    random.Random(seed).shuffle(pieces)
    open_rows: list[list[bytes]] = []
    closed_rows: list[list[bytes]] = []

    def room(row: list[bytes]) -> int:
        return row_length - sum(len(piece) + 1 for piece in row)

    for piece in pieces:
        fitting = [row for row in open_rows if room(row) > len(piece)]
        if fitting:
            min(fitting, key=room).append(piece)
            continue
        if len(open_rows) == OPEN_ROWS:
            fullest = min(open_rows, key=room)
            open_rows.remove(fullest)
            closed_rows.append(fullest)
        open_rows.append([piece])
    rows = closed_rows + open_rows
    random.Random(seed).shuffle(rows)
    return _to_tensors(rows, row_length)


def _to_tensors(rows: list[list[bytes]], row_length: int) -> PackedRows:
    shape = (len(rows), row_length)
    packed = PackedRows(
        tokens=torch.full(shape, BOUNDARY),
        targets=torch.full(shape, IGNORED_TARGET),
        segment_ids=torch.full(shape, PADDING_ID, dtype=torch.int32),
        positions=torch.zeros(shape, dtype=torch.int64),
    )
    for r, row in enumerate(rows):
        start = 0
        for number, piece in enumerate(row):
            text = torch.frombuffer(bytearray(piece), dtype=torch.uint8).long()
            end = start + len(piece) + 1
            packed.tokens[r, start + 1 : end] = text
            packed.targets[r, start : end - 1] = text
            packed.targets[r, end - 1] = BOUNDARY
            packed.segment_ids[r, start:end] = number
            packed.positions[r, start:end] = torch.arange(end - start)
            start = end
    return packed
