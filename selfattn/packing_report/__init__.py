"""What a packed batch is, seen before a training run: documents, padding, allowed pairs, visited blocks, wrong ids.

From the shell: ``python -m selfattn.packing_report batch.pt --picture batch.png`` (``--help`` lists the options).
"""

from typing import Any

import torch
from torch import Tensor

from selfattn.packing_report.notes import describe_ids, notes_of
from selfattn.packing_report.pairs import NO_ID, PositionRules
from selfattn.packing_report.report import Packing, PackingReport, Spread, make_report
from selfattn.packing_report.visited import KERNELS, Tiling

__all__ = ["PackingReport", "Spread", "packing_report"]


def packing_report(
    segment_ids: Tensor,
    causal: bool = True,
    kv_segment_ids: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    kernels: str = "cuda",
    head_dim: int = 128,
    v_head_dim: int | None = None,
    num_heads: int = 1,
    num_kv_heads: int | None = None,
) -> PackingReport:
    """What ``multihead_attention`` would make of these ids, and what looks wrong with them.

    ``print`` of the result is a table, ``draw`` a picture. It counts the allowed pairs exactly, in O(S log S) a row,
    and the blocks that the forward kernels of the backend ``flash`` visit, by the kernels' own rule: the tiles that
    they take for ``head_dim``; in contiguous rows (no id has two runs) the interval from the first
    query's document to the last one's, in others the blocks whose ranges and signatures of ids meet
    (selfattn/packing_report/visited.py names the sources). Three things are not counted: the block that a thread block
    of the causal kernel of "sm90" loads before the ids are known, where its tile would not have visited it (one a
    thread block at most); the tiles that are computed a second time for NaN or infinity; the rows of a block that the
    CPU kernel leaves out, and that the warps of "sm80" do, blocks being counted whole.

    The values are read on the host, which waits for the device. Ids that look like something else (positions, tokens,
    a mask, lengths) are reported all the same, with a note that says what was noticed.

    Args:
        segment_ids: (B, S) int32 or int64, as ``multihead_attention`` takes them; (S,) is one row. Other integers, bool
            and floats are read too, and noted: the operators refuse them.
        causal: as ``multihead_attention``.
        kv_segment_ids: (B, Skv), as ``multihead_attention``.
        window_left: as ``multihead_attention``.
        window_right: as ``multihead_attention``.
        kernels: "sm90" (compute capability 9.0; "cuda" means it, too), "sm80" (every other one since 8.0) or "cpu":
            whose tiles and rule the visited blocks follow.
        head_dim: DQK, which decides on the tiles and counts in FLOPs. One that is no multiple of 8 is served by kernels
            of "sm80" on every card.
        v_head_dim: DV; None is ``head_dim``.
        num_heads: NH, for the FLOPs and, on the CPU, the tiles.
        num_kv_heads: NKV; None is ``num_heads``.

    Returns:
        The report; ``report.notes`` is empty where nothing looks wrong.

    Raises:
        TypeError: ids that are no real tensor.
        ValueError: ids of another shape, not finite or empty; a bad number.
    """
    queries = _read_ids(segment_ids, "segment_ids")
    keys = None
    if kv_segment_ids is not None and not _is_same(kv_segment_ids, segment_ids):
        keys = _read_ids(kv_segment_ids, "kv_segment_ids")
        if len(keys) != len(queries):
            raise ValueError(
                f"selfattn: kv_segment_ids must have the batch size of segment_ids, {len(queries)}; got {len(keys)}"
            )
    for name, window in (("window_left", window_left), ("window_right", window_right)):
        if window < -1:
            raise ValueError(f"selfattn: {name} must be -1 (unbounded) or at least 0; got {window}")
    if kernels not in KERNELS:
        names = ", ".join(f'"{name}"' for name in KERNELS)
        raise ValueError(f"selfattn: kernels must be one of {names}; got {kernels!r}")
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    sizes = {"head_dim": head_dim, "v_head_dim": v_head_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"selfattn: {name} must be at least 1; got {size}")
    if num_heads % num_kv_heads:
        raise ValueError(f"selfattn: num_heads must be a multiple of num_kv_heads; got {num_heads} and {num_kv_heads}")
    notes = describe_ids(segment_ids, "segment_ids") + notes_of(queries, segment_ids)
    if keys is not None:
        notes += describe_ids(kv_segment_ids, "kv_segment_ids")
        queries, keys = _bring_to_int32(queries, keys)
    else:
        (queries,) = _bring_to_int32(queries)
    rules = PositionRules(bool(causal), int(window_left), int(window_right))
    tiling = Tiling.of(kernels, head_dim, v_head_dim, num_heads // num_kv_heads)
    packing = Packing(queries, keys, rules, tiling, head_dim, v_head_dim, num_heads, num_kv_heads)
    return make_report(packing, tuple(notes))


def _read_ids(ids: Any, name: str) -> Tensor:
    """As int64 on the CPU, padding NO_ID."""
    if not isinstance(ids, Tensor) or ids.is_complex() or ids.is_quantized or ids.layout != torch.strided:
        what = f"{ids.layout} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"selfattn: {name} must be a dense tensor of int32 or int64; got {what}")
    if ids.dim() not in (1, 2) or ids.numel() == 0:
        hint = "; a mask of pairs (B, 1, S, S) is not ids" if ids.dim() > 2 else ""
        raise ValueError(f"selfattn: {name} must have the shape (B, S), not empty; got {tuple(ids.shape)}{hint}")
    ids = ids.detach().cpu()
    if ids.is_floating_point():
        if not bool(torch.isfinite(ids).all()):
            raise ValueError(
                f"selfattn: {name} must be int32 or int64; got {ids.dtype} with values that are not finite"
            )
        ids = ids.floor()
    return torch.atleast_2d(ids.long()).clamp(min=NO_ID).contiguous()


def _bring_to_int32(*ids: Tensor) -> tuple[Tensor, ...]:
    """Ids beyond int32, which the operators refuse, by their rank: only which are equal and their order count here."""
    if all(int(part.max()) < 2**31 for part in ids):
        return ids
    values, ranks = torch.unique(torch.cat([part.flatten() for part in ids]), return_inverse=True)
    ranks = ranks - int((values < 0).any())
    return tuple(part.view_as(like) for part, like in zip(ranks.split([x.numel() for x in ids]), ids, strict=True))


def _is_same(key_ids: Any, query_ids: Any) -> bool:
    """Whether the kernels see that the key ids are the query ids under another name."""
    if not (isinstance(key_ids, Tensor) and isinstance(query_ids, Tensor)):
        return False
    same_memory = key_ids.data_ptr() == query_ids.data_ptr() and key_ids.stride() == query_ids.stride()
    return same_memory and key_ids.shape == query_ids.shape and key_ids.dtype == query_ids.dtype
