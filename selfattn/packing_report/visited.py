"""Which key blocks the kernels of the backend `flash` visit for each query tile: their own rules, computed again here.

The rules of CUDA's two families are for "sm90" that of the forward kernel's producer warp (``describe_tile`` and
``load_tiles`` of csrc/cuda/flash/sm90/forward/producer.cuh), and for "sm80" that of a thread block (``describe_tile``
and ``attend`` of csrc/cuda/flash/sm80/forward/kernel.cuh). Both walk as csrc/cuda/flash/tile/key_blocks.cuh has it,
over the tables of csrc/cuda/flash/segments/. A tile reaches from the first key that its first query may see by
position to the last key that its last query may see. In a contiguous row (no id has two runs, padding anywhere; where
the ids do not increase along the row, no more runs than csrc/cuda/flash/segments/run_table.cuh takes) this is cut to
the run of the first query and that of the last. Where keys have ids of their own a row is contiguous, too, if no id
that both sides have has two runs on either and these ids come in the same order on both; the table must take the runs
of the queries, and both sides must fit the shared memory of a thread block. In any other row each block in reach is
tested instead: the ranges of ids and the 64-bit signatures of tile and block must meet. A tile that meets nothing
visits one block all the same in "sm90", none in "sm80".

The CPU rule is that of csrc/cpu/pair_table.cpp (``make_pair_table``, ``may_meet``): the keys of each query are an
interval, by position and, where no id has two runs of keys, by the query's run; a tile reaches from the least to the
largest, and the ranges of ids of tile and block must meet. The heads that share a key head are rows beside each other,
so a tile of 64 rows is 64 / group queries.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from selfattn.packing_report.pairs import NO_ID, PositionRules, Runs, find_runs

# family -> (largest DQK, largest DV) -> rows of a query tile, keys of a block: ForwardTiles of
# csrc/cuda/flash/<family>/forward/config.h, in the order of dispatch.cu.
CUDA_TILES = {
    "sm90": {
        (64, 64): (192, 128),
        (96, 96): (128, 128),
        (128, 128): (128, 128),
        (192, 128): (128, 128),
        (192, 192): (128, 112),
        (256, 256): (128, 80),
    },
    "sm80": {
        (64, 64): (128, 128),
        (96, 96): (128, 64),
        (128, 128): (128, 64),
        (192, 128): (64, 64),
        (192, 192): (64, 64),
        (256, 256): (64, 64),
    },
}
UNALIGNED_DIMS = ((64, 64), (128, 128), (256, 256))
"""Whose tiles of "sm80" serve head dimensions that are no multiple of 8, on every card."""
SHARED_MEMORY = {"sm90": 227 << 10, "sm80": 99 << 10}
"""Bytes of a thread block; of "sm80" what every card that it serves has."""
KERNELS = {"cuda": "sm90", "sm90": "sm90", "sm80": "sm80", "cpu": "cpu"}  # by the names that may be asked for
CPU_TILE = (64, 64)  # kTileRows and kPanel of csrc/cpu/pair_table.h

_MATRIX_ELEMENTS = 1 << 24  # at a time
_HIGHEST = 2**31 - 1
_EVERY_BIT = -1


@dataclass(frozen=True)
class Tiling:
    """How the kernels cut the score square of a row."""

    kernels: str  # "sm90", "sm80" or "cpu"
    query_tile: int  # rows: queries, times `group`
    key_block: int
    group: int  # query heads that are rows of one tile; 1 on CUDA

    @classmethod
    def of(cls, kernels: str, head_dim: int, v_head_dim: int, group: int) -> "Tiling":
        kernels = KERNELS[kernels]
        if kernels == "cpu":
            return cls(kernels, *CPU_TILE, group)
        choice = CUDA_TILES[kernels]
        if head_dim % 8 != 0 or v_head_dim % 8 != 0:
            kernels = "sm80"
            choice = {dims: CUDA_TILES[kernels][dims] for dims in UNALIGNED_DIMS}
        for (most_qk, most_v), tiles in choice.items():
            if head_dim <= most_qk and v_head_dim <= most_v:
                return cls(kernels, *tiles, 1)
        raise ValueError(
            f"selfattn: head_dim must be at most 256 for the kernels on CUDA; got {max(head_dim, v_head_dim)}"
        )

    def query_tiles(self, query_length: int) -> int:
        return -(-query_length * self.group // self.query_tile)

    def key_blocks(self, key_length: int) -> int:
        return -(-key_length // self.key_block)


@dataclass(frozen=True)
class IdRanges:
    """The ids in each tile or block of some rows. A tile without ids has min > max, and signature 0."""

    min_id: Tensor
    max_id: Tensor
    signature: Tensor  # int64, a bit for each id; every bit where the kernels keep none

    def __getitem__(self, index: tuple) -> "IdRanges":
        return IdRanges(self.min_id[index], self.max_id[index], self.signature[index])

    def meets(self, other: "IdRanges") -> Tensor:
        in_range = (self.min_id <= other.max_id) & (other.min_id <= self.max_id)
        return in_range & ((self.signature & other.signature) != 0)


@dataclass(frozen=True)
class VisitedBlocks:
    """The visited blocks of some rows, from facts about each tile."""

    begin: Tensor  # (B, tiles) the key blocks in reach are begin .. end - 1
    end: Tensor
    blocks: int  # of a row
    compares: Tensor  # (B,) bool, ids are compared pair by pair
    tests: Tensor  # (B,) bool, ids are tested block by block
    tile_ids: IdRanges  # (B, tiles)
    block_ids: IdRanges  # (B, blocks)
    at_least_one: bool  # a tile visits its last block in reach where it meets none

    def count(self) -> Tensor:
        """(B,) blocks."""
        counts = (self.end - self.begin).sum(1)
        for row in self.tests.nonzero().flatten().tolist():
            counts[row] = sum(int(part.sum()) for part in self._parts(row))
        return counts

    def matrix(self, row: int) -> Tensor:
        """bool (tiles, blocks) of a row."""
        return torch.cat(list(self._parts(row)))

    def _parts(self, row: int) -> Iterator[Tensor]:
        tiles = self.begin.shape[1]
        step = max(1, _MATRIX_ELEMENTS // self.blocks)
        block = torch.arange(self.blocks)
        for first in range(0, tiles, step):
            part = (row, slice(first, first + step), None)
            begin, end = self.begin[part], self.end[part]
            visits = (block >= begin) & (block < end)
            if self.tests[row]:
                visits &= self.tile_ids[part].meets(self.block_ids[row, None])
                if self.at_least_one:
                    visits |= ~visits.any(1, keepdim=True) & (block == end - 1)
            yield visits


def find_visited(
    query_ids: Tensor, key_ids: Tensor, has_own_key_ids: bool, rules: PositionRules, tiling: Tiling
) -> VisitedBlocks:
    """Of rows of ids (B, Sq) and (B, Skv), in which padding is NO_ID. ``has_own_key_ids``: they are two tensors."""
    find = _visited_on_cpu if tiling.kernels == "cpu" else _visited_on_cuda
    return find(query_ids, key_ids, has_own_key_ids, rules, tiling)


def _visited_on_cuda(
    query_ids: Tensor, key_ids: Tensor, has_own_key_ids: bool, rules: PositionRules, tiling: Tiling
) -> VisitedBlocks:
    query_length, key_length = query_ids.shape[1], key_ids.shape[1]
    first = torch.arange(0, query_length, tiling.query_tile)
    last = (first + tiling.query_tile).clamp(max=query_length) - 1
    key_begin, key_end = rules.key_limits(query_length, key_length)
    begin, end = key_begin[first].repeat(len(query_ids), 1), key_end[last].repeat(len(query_ids), 1)
    runs = find_runs(query_ids)
    if has_own_key_ids:
        slots = _slots_of_two_sides(query_length, key_length, tiling)
        is_contiguous, segment_begin, segment_end = _intervals_of_two_sides(query_ids, key_ids, runs)
    else:
        slots = _id_slots(query_length)
        is_contiguous, segment_begin, segment_end = runs.are_distinct, runs.begin, runs.end
    is_contiguous = is_contiguous & (runs.is_first.sum(1) <= slots // 4 * 3) & (slots > 0)
    compares = ~(is_contiguous if has_own_key_ids else is_contiguous | runs.is_ascending)
    begin = torch.where(compares[:, None], begin, begin.maximum(segment_begin[:, first]))
    end = torch.where(compares[:, None], end, end.minimum(segment_end[:, last]))
    blocks = tiling.key_blocks(key_length)
    at_least_one = tiling.kernels == "sm90"
    is_empty = begin >= end
    begin = begin // tiling.key_block
    end = torch.where(is_empty, begin, -(-end // tiling.key_block)).maximum(begin + at_least_one)
    tile_ids, block_ids = (
        _ranges_with_signatures(ids, size)
        for ids, size in ((query_ids, tiling.query_tile), (key_ids, tiling.key_block))
    )
    return VisitedBlocks(begin, end, blocks, compares, compares, tile_ids, block_ids, at_least_one)


def _intervals_of_two_sides(query_ids: Tensor, key_ids: Tensor, queries: Runs) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) whether the ids that both sides have fill one run on each, in the same order; of such rows (B, Sq) begin and
    end of the keys of each query's segment. A query without any has an empty interval behind those of the queries
    before it. ``Row::interval`` of csrc/cuda/flash/segments/prepare.cu."""
    keys = find_runs(key_ids)
    runs_of_queries, _ = _runs_of_ids(query_ids, query_ids, queries)
    runs_of_keys, first = _runs_of_ids(query_ids, key_ids, keys)
    has_keys = runs_of_keys > 0
    is_one_run = ~(has_keys & ((runs_of_keys > 1) | (runs_of_queries > 1))).any(1)
    rises = ~(has_keys & (first < first.masked_fill(~has_keys, 0).cummax(1).values)).any(1)
    end = keys.end.gather(1, first).masked_fill(~has_keys, 0).cummax(1).values
    return is_one_run & rises, torch.where(has_keys, first, end), end


def _runs_of_ids(ids: Tensor, side_ids: Tensor, side: Runs) -> tuple[Tensor, Tensor]:
    """How many runs of a side (B, S) have each id of (B, Sq), none of padding, and where the first of them starts."""
    by_id, position = side_ids.masked_fill(~side.is_first, NO_ID).sort(dim=1, stable=True)
    ids = ids.contiguous()
    place = torch.searchsorted(by_id, ids)
    count = (torch.searchsorted(by_id, ids, right=True) - place).masked_fill(ids < 0, 0)
    return count, position.gather(1, place.clamp(max=side_ids.shape[1] - 1))


def _slots_of_two_sides(query_length: int, key_length: int, tiling: Tiling) -> int:
    """``launch_prepare_segments`` of prepare.cu: of the table of runs, 0 where a row is too long."""
    words = (SHARED_MEMORY[tiling.kernels] - 2048) // 4 - sum(
        3 * 8 * -(-length // 256) for length in (query_length, key_length)
    )
    words -= -(-tiling.query_tiles(query_length) // 4) * 4
    slots = _id_slots(query_length)
    while slots > 32 and 3 * slots > words:
        slots //= 2
    return slots if 3 * slots <= words else 0


def _id_slots(length: int) -> int:
    """``RunTable::slots_for`` of csrc/cuda/flash/segments/run_table.cuh."""
    slots = 32
    while slots < 8192 and 8 * slots < length:
        slots *= 2
    return slots


def _visited_on_cpu(
    query_ids: Tensor, key_ids: Tensor, has_own_key_ids: bool, rules: PositionRules, tiling: Tiling
) -> VisitedBlocks:
    runs = find_runs(key_ids)
    begin, end = rules.key_limits(query_ids.shape[1], key_ids.shape[1])
    run_begin, run_end = _run_of_each_query(query_ids, key_ids, runs)
    is_run = runs.are_distinct[:, None]
    begin = torch.where(is_run, begin.maximum(run_begin), begin)
    end = torch.where(is_run, end.minimum(run_end), end)
    is_empty = (begin >= end) | (query_ids < 0)

    def of_tiles(values: Tensor, if_empty: int) -> Tensor:
        rows = values.masked_fill(is_empty, if_empty).repeat_interleave(tiling.group, 1)
        return _split(rows, tiling.query_tile, if_empty)

    begin, end = of_tiles(begin, _HIGHEST).amin(2), of_tiles(end, 0).amax(2)
    is_empty_tile = begin >= end
    begin = (begin // tiling.key_block).masked_fill(is_empty_tile, 0)
    end = (-(-end // tiling.key_block)).masked_fill(is_empty_tile, 0)
    tile_ids = _ranges(of_tiles(query_ids, _HIGHEST), of_tiles(query_ids, NO_ID))
    keys = key_ids.masked_fill(key_ids < 0, _HIGHEST)
    block_ids = _ranges(_split(keys, tiling.key_block, _HIGHEST), _split(key_ids, tiling.key_block, NO_ID))
    blocks = tiling.key_blocks(key_ids.shape[1])
    tests = torch.ones(len(query_ids), dtype=torch.bool)
    return VisitedBlocks(begin, end, blocks, ~runs.are_distinct, tests, tile_ids, block_ids, at_least_one=False)


def _run_of_each_query(query_ids: Tensor, key_ids: Tensor, runs: Runs) -> tuple[Tensor, Tensor]:
    """begin and end of the run of keys with the query's id, in rows where no id has two; empty where there is none."""
    by_id, position = key_ids.sort(dim=1, stable=True)
    place = torch.searchsorted(by_id, query_ids.contiguous()).clamp(max=key_ids.shape[1] - 1)
    first = position.gather(1, place)
    is_found = (key_ids.gather(1, first) == query_ids) & (query_ids >= 0)
    return first.masked_fill(~is_found, 0), runs.end.gather(1, first).masked_fill(~is_found, 0)


def _split(values: Tensor, size: int, fill: int) -> Tensor:
    """(B, S) as (B, tiles, size), the last tile filled up."""
    missing = -values.shape[1] % size
    return torch.nn.functional.pad(values, (0, missing), value=fill).view(len(values), -1, size)


def _ranges(for_min: Tensor, for_max: Tensor) -> IdRanges:
    min_id = for_min.amin(2)
    return IdRanges(min_id, for_max.amax(2), torch.full_like(min_id, _EVERY_BIT))


def _ranges_with_signatures(ids: Tensor, size: int) -> IdRanges:
    """``write_block`` of prepare.cu: a block with one id and padding looks like two ids."""
    tiles = _split(ids, size, NO_ID)
    is_real = tiles >= 0
    min_id, max_id = tiles.masked_fill(~is_real, _HIGHEST).amin(2), tiles.amax(2)
    # Padding past the end of the row is none of the block's.
    has_padding = (~is_real & _split(torch.ones_like(ids), size, 0).bool()).any(2)
    looks_uniform = has_padding & (min_id == max_id)
    max_id = max_id + (looks_uniform & (max_id < _HIGHEST)).long()
    min_id = min_id - (looks_uniform & (max_id == min_id)).long()
    bit = (tiles.clamp(min=0) * 0x9E3779B1 & 0xFFFFFFFF) >> 26
    has_bit = torch.zeros(*tiles.shape[:2], 65, dtype=torch.bool)  # the last is the bit of padding
    has_bit.scatter_(2, bit.masked_fill(~is_real, 64), True)
    return IdRanges(min_id, max_id, (has_bit[..., :64].long() << torch.arange(64)).sum(2))
