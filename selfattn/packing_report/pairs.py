"""Which pairs are allowed (docs/semantics.md), counted in O(S log S) a row."""

from dataclasses import dataclass

import torch
from torch import Tensor

NO_ID = -1  # what every negative id is brought to


@dataclass(frozen=True)
class PositionRules:
    """What causality and the window leave to a query, whatever its document."""

    causal: bool
    window_left: int
    window_right: int

    def __str__(self) -> str:
        windows = {"window_left": self.window_left, "window_right": self.window_right}
        named = [f"{name} {size}" for name, size in windows.items() if size >= 0]
        return ", ".join(["causal" if self.causal else "not causal", *named])

    def key_limits(self, query_length: int, key_length: int) -> tuple[Tensor, Tensor]:
        """begin and end (Sq,): query i may see the keys [begin, end), which is empty where end <= begin."""
        shift = key_length - query_length
        position = torch.arange(query_length) + shift
        left, right = (_finite(side, query_length + key_length) for side in (self.window_left, self.window_right))
        if self.causal:
            right = 0
        return (position - left).clamp(min=0), (position + right + 1).clamp(max=key_length)


def _finite(side: int, unbounded: int) -> int:
    return unbounded if side < 0 else min(side, unbounded)


@dataclass(frozen=True)
class Runs:
    """Neighbouring tokens of one id, in each of some rows. Padding belongs to no run: begin == end == the token."""

    begin: Tensor  # (B, S) where the token's run begins
    end: Tensor  # (B, S) where it ends
    is_first: Tensor  # (B, S) bool, the first token of a run of an id >= 0
    is_ascending: Tensor  # (B,) bool, the ids of the runs strictly increase along the row
    are_distinct: Tensor  # (B,) bool, no id has two runs


def find_runs(ids: Tensor) -> Runs:
    """Runs of (B, S) ids in which padding is NO_ID."""
    length = ids.shape[1]
    position = torch.arange(length).expand_as(ids)
    differs = ids[:, 1:] != ids[:, :-1]
    edge = torch.ones_like(ids[:, :1], dtype=torch.bool)
    is_start, is_last, is_real = torch.cat([edge, differs], 1), torch.cat([differs, edge], 1), ids >= 0
    begin = torch.where(is_start, position, 0).cummax(1).values
    end = torch.where(is_last, position + 1, length).flip(1).cummin(1).values.flip(1)
    is_first = is_start & is_real
    by_id = ids.sort(1).values
    distinct = torch.cat([by_id[:, :1] >= 0, (by_id.diff(dim=1) != 0) & (by_id[:, 1:] >= 0)], 1)
    highest_before = torch.cat([torch.full_like(ids[:, :1], NO_ID), ids[:, :-1].cummax(1).values], 1)
    return Runs(
        torch.where(is_real, begin, position),
        torch.where(is_real, end, position),
        is_first,
        ~(is_first & (ids <= highest_before)).any(1),
        is_first.sum(1) == distinct.sum(1),
    )


def count_allowed_keys(query_ids: Tensor, key_ids: Tensor, rules: PositionRules) -> Tensor:
    """(B, Sq) how many keys each query may attend to. Ids (B, Sq), (B, Skv) in any order, below 2^31."""
    key_length = key_ids.shape[1]
    begin, end = rules.key_limits(query_ids.shape[1], key_length)
    # A key is the number id * Skv + position: sorted, those of one id are neighbours, in the order of the row.
    keys = (key_ids * key_length + torch.arange(key_length)).masked_fill(key_ids < 0, NO_ID).sort(1).values
    ids = query_ids.clamp(min=0) * key_length
    count = torch.searchsorted(keys, ids + end) - torch.searchsorted(keys, ids + begin)
    return count.clamp(min=0).masked_fill(query_ids < 0, 0)
