"""What looks wrong with segment ids, in words. A note is a suspicion: some right packings look like a wrong one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from selfattn.packing_report.pairs import NO_ID, Runs, find_runs

_MOST_ROWS_NAMED = 3
_CUDA_MAX_TOKENS = 1 << 19  # kMaxSegmentLength of csrc/cuda/flash/segments/tables.h


def describe_ids(ids: Tensor, name: str) -> list[str]:
    """What the operators would say of the tensor itself."""
    notes = []
    if ids.dtype == torch.bool:
        notes.append(
            f"{name} is a tensor of bool, which the operators refuse: an attention mask? Ids number documents."
        )
    elif ids.dtype not in (torch.int32, torch.int64):
        fraction = ids.is_floating_point() and bool((ids != ids.floor()).any())
        rounded = " Some are no integers; here they are rounded down." if fraction else ""
        notes.append(f"{name} is {ids.dtype}, and the operators take int32 or int64 alone.{rounded}")
    elif int(ids.max()) >= 2**31 or int(ids.min()) < -(2**31):
        notes.append(f"{name} holds values that do not fit in int32, which the operators refuse: hashes, or addresses?")
    if ids.dim() == 1:
        notes.append(f"{name} has one dimension and is read as one row; the operators take (B, S).")
    if ids.shape[-1] > _CUDA_MAX_TOKENS:
        notes.append(f"flash on CUDA refuses ids for rows of more than {_CUDA_MAX_TOKENS:,} tokens.")
    return notes


@dataclass(frozen=True)
class _Facts:
    ids: Tensor  # (B, S), padding NO_ID
    runs: Runs
    is_real: Tensor  # (B, S)
    documents: Tensor  # (B,) different ids of a row
    is_pair: Tensor  # (B, S - 1) two neighbours, neither of them padding
    step: Tensor  # (B, S - 1) from a token's id to its right neighbour's

    @property
    def run_count(self) -> Tensor:
        return self.runs.is_first.sum(1)

    def share_of_pairs(self, condition: Tensor) -> float:
        return float((condition & self.is_pair).sum()) / max(int(self.is_pair.sum()), 1)


def notes_of(ids: Tensor, given: Tensor) -> list[str]:
    """Of (B, S) ids in which padding is NO_ID. ``given``: the tensor as it came, for its dtype and shape."""
    is_real = ids >= 0
    if not bool(is_real.any()):
        return ["every id is negative: all of it is padding, and every output is 0."]
    ordered = find_runs(ids.sort(1).values)
    facts = _Facts(
        ids, find_runs(ids), is_real, ordered.is_first.sum(1), is_real[:, 1:] & is_real[:, :-1], ids.diff(dim=1)
    )
    notes = [_all_equal(facts) or _mask(facts, given) or _positions(facts) or _cu_seqlens(facts, given)
             or _all_different(facts, given) or _tokens(facts) or _sorted_values(facts)]  # fmt: skip
    explained = notes[0] is not None
    if not explained:
        notes += [_zero_as_padding(facts), _sorted_padding(facts), _pieces(facts)]
    notes.append(_empty_rows(facts))
    return [note for note in notes if note]


def _all_equal(f: _Facts) -> str | None:
    if f.ids.shape[1] == 1 or int(f.documents.max()) > 1:
        return None
    values = torch.unique(f.ids[f.is_real])
    padding = "" if bool(f.is_real.all()) else " that is not padding"
    if len(values) > 1:
        return (
            f"the ids differ from row to row alone: in each row every token{padding} has the same one, so every row is "
            "one document. (Ids are compared within a row, never between rows.)"
        )
    return (
        f"all equal: every token{padding} has the id {int(values[0])}, so every row is one document and its tokens "
        "attend to one another as without ids. If texts were packed, their boundaries are lost."
    )


def _mask(f: _Facts, given: Tensor) -> str | None:
    """0 and 1: an attention mask, or two documents a row."""
    if int(f.ids.max()) != 1 or bool((f.ids == NO_ID).any()) or int(f.ids.min()) != 0:
        return None
    falls = bool((f.step < 0).any())
    if given.dtype != torch.bool and not falls and int(f.documents.min()) > 1:
        return (
            "the ids are 0, then 1, in every row: two documents, or an attention mask with padding on the left? Of a "
            "mask the padding would be a document of its own: padding has a negative id."
        )
    if given.dtype != torch.bool and not falls:
        return None
    return (
        "the ids are 0 and 1, with 0 behind 1: this looks like an attention mask. As ids, all the 1s of a row are one "
        "document and the 0s, padding perhaps, another. Padding has a negative id: mask.int() - 1 is one document and "
        "its padding."
    )


def _positions(f: _Facts) -> str | None:
    """0 .. n - 1, restarting: every step is + 1, or to the least id, padding and one-token documents among these."""
    least = int(f.ids[f.is_real].min())
    rises, restarts = f.step == 1, f.ids[:, 1:] == least
    if least > 1 or f.share_of_pairs(rises | restarts) < 1 or f.share_of_pairs(rises) <= 0.5:
        return None
    if bool((f.ids[:, :1][f.is_real[:, :1]] != least).any()):
        return None
    count = int((restarts & f.is_pair).sum())
    how = f"in runs of + 1 that restart {count:,} times" if count else "and count on to the end of the row"
    return (
        f"these look like position_ids: they start at {least}, {how}. As ids, tokens at the same position of different "
        "documents attend to each other, and to nothing of their own. selfattn.segment_ids_from_positions(positions) "
        "gives the ids."
    )


def _cu_seqlens(f: _Facts, given: Tensor) -> str | None:
    """Rising from 0 in steps of which some are larger than 1; the end may repeat."""
    if f.ids.shape[1] < 3 or bool((f.ids[:, 0] != 0).any()) or bool((f.step < 0).any()):
        return None
    stays = f.step == 0
    repeats_end_only = bool((stays.int().diff(dim=1) >= 0).all())
    if not repeats_end_only or bool(stays[:, :2].any()) or int(f.step.max()) < 2:
        return None
    convert = "selfattn.segment_ids_from_cu_seqlens(cu_seqlens, length)"
    return (
        f"these look like cumulative lengths (cu_seqlens): {f.ids.shape[1]:,} a row, which rise in uneven steps from 0 "
        f"to {int(f.ids.max()):,}. Ids have one entry a token: {convert} gives them."
    )


def _all_different(f: _Facts, given: Tensor) -> str | None:
    if f.ids.shape[1] == 1 or bool((f.documents != f.is_real.sum(1)).any()):
        return None
    lengths = ""
    if given.dim() == 1 or f.ids.shape[1] < 64:
        lengths = " If these are the lengths of documents: torch.repeat_interleave(torch.arange(n), lengths) gives ids."
    return f"all different: no two tokens of a row share an id, so each token attends to itself alone.{lengths}"


def _tokens(f: _Facts) -> str | None:
    """Neighbours hardly ever share an id, many ids, which come back."""
    rows = f.documents >= 8
    if f.share_of_pairs(f.step == 0) > 0.2 or not bool(rows.any()) or float(rows.double().mean()) < 0.5:
        return None
    if int((f.run_count > f.documents).sum()) < 0.5 * len(rows):
        return None
    return (
        "these look like token ids (input_ids): neighbours hardly ever share an id "
        f"({f.share_of_pairs(f.step == 0):.1%} do), and ids come back in other places. Each token attends to its own "
        "repetitions."
    )


def _sorted_values(f: _Facts) -> str | None:
    """Rising ids that were never numbers of documents: many tiny runs with gaps, or ever shorter ones."""
    if not bool(f.runs.is_ascending.all()) or int(f.documents.min()) < 16:
        return None
    lengths = (f.runs.end - f.runs.begin)[f.runs.is_first]
    row_of_run = f.runs.is_first.nonzero()[:, 0]
    same_row = row_of_run[1:] == row_of_run[:-1]
    jumps = f.ids[f.runs.is_first].diff()[same_row] > 1
    falls = (lengths.diff()[same_row] <= 0).all()
    is_tiny = float(lengths.double().median()) <= 4
    if is_tiny and float(jumps.double().mean()) > 0.3:
        origin = "token ids"
    elif bool(falls) and int(f.documents.min()) > 4 * int(lengths.max()):
        origin = "position_ids"
    else:
        return None
    what = "tiny documents, most ids left out" if origin == "token ids" else "each document is no longer than the last"
    return (
        f"the ids rise along every row as if something had been sorted ({what}): sorted {origin}? A sort of the ids "
        "alone parts them from their tokens."
    )


def _zero_as_padding(f: _Facts) -> str | None:
    """Documents 1, 2, ..., then 0 to the end of the row."""
    is_zero = f.ids == 0
    behind = is_zero[:, -1] & ((f.runs.is_first & is_zero).sum(1) == 1) & (f.documents > 1)
    if not bool(behind.any()) or bool((is_zero[:, 0] & ~is_zero[:, -1]).any()):
        return None
    return (
        f"{_rows(behind)} with ids from 1 on and 0 at the end: is 0 padding there? Here it is a document; padding has "
        "a negative id (ids - 1 where documents count from 1)."
    )


def _sorted_padding(f: _Facts) -> str | None:
    """Padding in front of rising ids: on the left on purpose, or by a sort."""
    has_padding = ~f.is_real.all(1) & f.is_real.any(1)
    in_front = (f.ids.diff(dim=1) >= 0).all(1)
    if int(has_padding.sum()) < 1 or not bool(in_front[has_padding].all()):
        return None
    return (
        f"{_rows(has_padding)} with all padding in front of ids that only rise: padded on the left, or were the ids "
        "sorted by accident, apart from their tokens?"
    )


def _pieces(f: _Facts) -> str | None:
    extra = f.run_count - f.documents
    rows = extra > 0
    if not bool(rows.any()):
        return None
    # A piece that follows padding, and before that its own document, was cut by padding alone.
    last_real = f.ids.masked_fill(~f.is_real, 0)
    position = torch.arange(f.ids.shape[1]).expand_as(f.ids).masked_fill(~f.is_real, 0).cummax(1).values
    before = last_real.gather(1, torch.cat([torch.zeros_like(position[:, :1]), position[:, :-1]], 1))
    any_before = torch.cat([torch.zeros_like(f.is_real[:, :1]), f.is_real[:, :-1]], 1).cummax(1).values
    by_padding = int((f.runs.is_first & any_before & (before == f.ids)).sum())
    by_others = int(extra.sum()) - by_padding
    reasons = []
    if by_others:
        reasons.append(f"{by_others:,} times an id comes back after another document")
    if by_padding:
        reasons.append(f"{by_padding:,} times a document goes on behind padding")
    return (
        f"{_rows(rows)} in which a document stands in several pieces: {', '.join(reasons)}. The pieces attend to each "
        "other as one document; the kernels compare such rows id by id, which is slower."
    )


def _empty_rows(f: _Facts) -> str | None:
    rows = ~f.is_real.any(1)
    return f"{_rows(rows)} of padding alone." if bool(rows.any()) else None


def _rows(which: Tensor) -> str:
    """ "12 rows (0, 3, 4, ...)"."""
    rows = which.nonzero().flatten().tolist()
    named = ", ".join(map(str, rows[:_MOST_ROWS_NAMED])) + (", ..." if len(rows) > _MOST_ROWS_NAMED else "")
    return f"{len(rows):,} {'row' if len(rows) == 1 else 'rows'} ({named})"
