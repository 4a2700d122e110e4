"""What a packed row must promise: a document's logits depend on that document alone."""

from dataclasses import dataclass, replace

import torch
from packing import BOUNDARY, PADDING_ID, PackedRows
from parallel import OneProcess
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
def check_isolation(model: nn.Module, rows: PackedRows, ranks: OneProcess) -> Isolation:
    """Changes every byte of one document after the other, and compares all logits bit by bit, on every rank."""
    rows = rows[rows.segment_ids.amax(dim=1) > 0]
    documents = int(rows.segment_ids.max()) + 1 if len(rows) else 0
    rows = ranks.own_tokens(rows).to(ranks.device)
    logits = logits_of(model, rows)
    is_there, is_moved, leaks = torch.zeros(3, len(rows), documents, dtype=torch.bool, device=ranks.device)
    for number in range(documents):
        document = rows.segment_ids == number  # one of each row, where the row has so many
        others = (rows.segment_ids != PADDING_ID) & ~document
        tokens = torch.where(document & (rows.tokens != BOUNDARY), (rows.tokens + 1) % BOUNDARY, rows.tokens)
        moved = (logits_of(model, replace(rows, tokens=tokens)) != logits).any(dim=-1)
        is_there[:, number] = document.any(dim=1)
        is_moved[:, number] = (moved & document).any(dim=1)
        leaks[:, number] = (moved & others).any(dim=1)
    is_there, is_moved, leaks = ranks.any(torch.stack([is_there, is_moved, leaks]))
    return Isolation(
        documents_changed=int(is_there.sum()),
        others_changed_too=int(leaks.sum()),
        unmoved_by_own_change=int((is_there & ~is_moved).sum()),
    )


def most_crowded(rows: PackedRows, count: int) -> PackedRows:
    """The rows with the most documents."""
    return rows[rows.segment_ids.amax(dim=1).argsort(descending=True)[:count]]
