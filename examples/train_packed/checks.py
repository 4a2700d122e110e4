"""What a packed row must promise: a document's logits depend on that document alone."""

from dataclasses import dataclass, replace

import torch
from packing import BOUNDARY, PADDING_ID, PackedRows
from torch import nn
from training import logits_of


@dataclass(frozen=True)
class Isolation:
    """Counts over every document that shares its row with another."""

    documents_changed: int
    others_changed_too: int
    unmoved_by_own_change: int

    @property
    def holds(self) -> bool:
        """The last count is there so that the check can fail: a model that ignores its input would pass the others."""
        return self.documents_changed > 0 and self.others_changed_too == 0 and self.unmoved_by_own_change == 0


@torch.no_grad()
def check_isolation(model: nn.Module, rows: PackedRows) -> Isolation:
    """Changes every byte of one document after the other, and compares all logits bit by bit."""
    rows = rows[rows.segment_ids.amax(dim=1) > 0]
    logits = logits_of(model, rows)
    changed, leaks, unmoved = 0, 0, 0
    for number in rows.segment_ids.unique().tolist():
        if number == PADDING_ID:
            continue
        document = rows.segment_ids == number  # one of each row, where the row has so many
        tokens = torch.where(document & (rows.tokens != BOUNDARY), (rows.tokens + 1) % BOUNDARY, rows.tokens)
        moved = (logits_of(model, replace(rows, tokens=tokens)) != logits).any(dim=-1)
        real = rows.segment_ids != PADDING_ID
        for row in range(len(rows)):
            if document[row].any():
                changed += 1
                leaks += int((moved[row] & real[row] & ~document[row]).any())
                unmoved += int(not (moved[row] & document[row]).any())
    return Isolation(documents_changed=changed, others_changed_too=leaks, unmoved_by_own_change=unmoved)


def most_crowded(rows: PackedRows, count: int) -> PackedRows:
    """The rows with the most documents."""
    return rows[rows.segment_ids.amax(dim=1).argsort(descending=True)[:count]]
