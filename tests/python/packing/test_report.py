"""Promise: a packing report counts what a dense mask holds and what the kernels visit, and says what looks wrong."""

import ctypes
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT
from support.cpp_build import run, tool
from torch import Tensor

import selfattn
from selfattn.packing_report import PackingReport
from selfattn.packing_report.__main__ import main
from selfattn.packing_report.picture import ALLOWED, NOT_VISITED, VISITED, make_figure, score_square
from selfattn.packing_report.visited import CPU_TILE, CUDA_TILES, UNALIGNED_DIMS, Tiling

CSRC = ROOT / "csrc"
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


def packed(*lengths: int, padding: int = 0) -> Tensor:
    """(1, S) ids of documents of these lengths, then padding."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.cat([ids, torch.full((padding,), -1)])[None].int()


def runs_in_order(ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """(length,) most runs of a row, of other lengths and with padding between some, as far as they go."""
    runs = torch.unique_consecutive(ids)
    runs = runs[torch.rand(len(runs), generator=generator) < 0.8]
    most = 2 * length // max(len(runs), 1) + 1
    sizes = torch.randint(1, most + 1, (len(runs), 2), generator=generator)
    sizes[:, 1] *= torch.rand(len(runs), generator=generator) < 0.3
    stretched = torch.stack([runs, torch.full_like(runs, -1)], 1).flatten().repeat_interleave(sizes.flatten())[:length]
    return torch.cat([stretched, stretched.new_full((length - len(stretched),), -1)])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, dict]:
    """Rows of one batch, in order, in any order or with large ids, whose runs are longer and shorter than blocks."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 700))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def row(length: int) -> Tensor:
        kind = draw(st.sampled_from(["ascending", "any order", "scattered", "large", "tokens", "padding"]))
        most = draw(st.sampled_from([3, 40, 400]))
        sizes = torch.randint(1, most + 1, (length,), generator=generator)
        ids = torch.repeat_interleave(torch.arange(length), sizes)[:length]
        if kind == "any order":
            ids = torch.randint(0, 6, (length,), generator=generator)[ids]
        if kind == "scattered":
            ids = torch.randint(0, 1000, (length,), generator=generator)[ids]
        if kind == "large":
            ids = INT_MAX - torch.randint(0, 4, (length,), generator=generator)[ids]
        if kind == "tokens":
            ids = torch.randint(0, 300, (length,), generator=generator)
        stretch = draw(st.sampled_from([5, 150]))
        is_padding = torch.rand(length, generator=generator)[torch.arange(length) // stretch] < 0.2
        return ids.masked_fill(is_padding | (kind == "padding"), draw(st.sampled_from([-1, -9])))

    ids = torch.stack([row(length) for _ in range(batch)])
    keys = None
    if draw(st.booleans()):
        key_length = draw(st.integers(1, 700))
        if draw(st.booleans()):
            keys = torch.stack([row(key_length) for _ in range(batch)])
        else:
            keys = torch.stack([runs_in_order(of_row, key_length, generator) for of_row in ids])
    window = st.sampled_from([-1, -1, 0, 1, 50, 130, 10_000, 2**62])
    rules = {"causal": draw(st.booleans()), "window_left": draw(window), "window_right": draw(window)}
    return ids, keys, rules


def allowed_mask(ids: Tensor, keys: Tensor, causal: bool, window_left: int, window_right: int) -> Tensor:
    """bool (B, Sq, Skv), by the rules of docs/semantics.md."""
    here = (torch.arange(ids.shape[1]) + keys.shape[1] - ids.shape[1])[:, None]
    key = torch.arange(keys.shape[1])
    mask = selfattn.segment_mask(ids, keys)[:, 0]
    if causal:
        mask = mask & (key <= here)
    if window_left >= 0:
        mask = mask & (key >= here - window_left)
    if window_right >= 0:
        mask = mask & (key <= here + min(window_right, 2**40))
    return mask


# ---------------------------------------------------------------- counts


@given(cases())
def test_allowed_pairs_are_those_of_the_dense_mask(case: tuple) -> None:
    ids, keys, rules = case
    report = selfattn.packing_report(ids, kv_segment_ids=keys, **rules)
    mask = allowed_mask(ids, ids if keys is None else keys, **rules)
    assert report.allowed_pairs == int(mask.sum()) and report.pairs == mask.numel()
    whole = torch.zeros_like(ids[:1]), torch.zeros_like((ids if keys is None else keys)[:1])
    assert report.dense_allowed_pairs == len(ids) * int(allowed_mask(*whole, **rules).sum())


@given(cases())
def test_documents_and_padding_are_those_of_each_row(case: tuple) -> None:
    ids, _, _ = case
    report = selfattn.packing_report(ids)
    documents = [[int((row == i).sum()) for i in row.unique() if i >= 0] for row in ids]
    assert report.documents.min == min(map(len, documents)) and report.documents.max == max(map(len, documents))
    lengths = sorted(length for row in documents for length in row)
    assert report.padding == ids.numel() - sum(lengths)
    if lengths:
        assert (report.lengths.min, report.lengths.max) == (lengths[0], lengths[-1])
        assert report.lengths.median == (lengths[(len(lengths) - 1) // 2] + lengths[len(lengths) // 2]) / 2
        for least, largest, count in report.length_histogram:
            assert count == sum(least <= length <= largest for length in lengths)
        assert sum(count for *_, count in report.length_histogram) == len(lengths)
    fill = (ids >= 0).double().mean(1)
    assert report.fill.min == pytest.approx(float(fill.min())) and report.fill.max == pytest.approx(float(fill.max()))
    assert (report.lengths is None) == (not lengths)


def visited_on_cuda(
    ids: list[int], keys: list[int], is_own: bool, rules: dict, sizes: tuple[int, int], family: str
) -> Tensor:
    """What walks over the key blocks in the forward kernel, tile by tile, as slowly as it reads."""
    tile_size, block_size = sizes
    offset, far = len(keys) - len(ids), 2**40
    left = far if rules["window_left"] < 0 else rules["window_left"]
    right = 0 if rules["causal"] else far if rules["window_right"] < 0 else rules["window_right"]
    starts = [i for i, x in enumerate(ids) if x >= 0 and (i == 0 or ids[i - 1] != x)]
    is_rising = all(ids[a] < ids[b] for a, b in itertools.pairwise(starts))
    slots = max(32, min(8192, 2 ** math.ceil(math.log2(len(ids) / 8))))
    is_told_apart = len({ids[start] for start in starts}) == len(starts) <= slots // 4 * 3
    if is_own:
        key_starts = [j for j, x in enumerate(keys) if x >= 0 and (j == 0 or keys[j - 1] != x)]
        both = {ids[i] for i in starts} & {keys[j] for j in key_starts}
        order, key_order = (
            [x for x in side if x in both] for side in ([ids[i] for i in starts], [keys[j] for j in key_starts])
        )
        is_contiguous = order == key_order and len(set(order)) == len(order) and len(starts) <= slots // 4 * 3
    else:
        is_contiguous = is_rising or is_told_apart

    def run_of(token: int) -> tuple[int, int]:
        """The keys of its segment; of none, an empty interval behind those of the tokens before."""
        own_keys = [j for j, x in enumerate(keys) if x == ids[token] >= 0]
        if own_keys:
            return own_keys[0], own_keys[-1] + 1
        if not is_own:
            return token, token
        behind = 1 + max((j for j, x in enumerate(keys) if x >= 0 and x in ids[:token]), default=-1)
        return behind, behind

    def summary(part: list[int]) -> tuple[int, int, set[int]]:
        real = [x for x in part if x >= 0]
        least, most = min(real, default=INT_MAX), max(real, default=INT_MIN)
        if len(real) < len(part) and least == most:
            least, most = (least, most + 1) if most < INT_MAX else (least - 1, most)
        return least, most, {(x * 0x9E3779B1) % 2**32 >> 26 for x in real}

    tiles, blocks = -(-len(ids) // tile_size), -(-len(keys) // block_size)
    visited = torch.zeros(tiles, blocks, dtype=torch.bool)
    for tile in range(tiles):
        first, last = tile * tile_size, min((tile + 1) * tile_size, len(ids)) - 1
        begin, end = max(first + offset - left, 0), min(last + offset + right + 1, len(keys))
        if is_contiguous:
            begin, end = max(begin, run_of(first)[0]), min(end, run_of(last)[1])
        if begin >= end and family == "sm80":
            continue
        first_block = min(max(begin, 0) // block_size, blocks - 1)
        end_block = max(-(-end // block_size), first_block + 1)
        if is_contiguous:
            visited[tile, first_block:end_block] = True
            continue
        least, most, bits = summary(ids[first : last + 1])
        for block in range(first_block, end_block):
            key_least, key_most, key_bits = summary(keys[block * block_size : (block + 1) * block_size])
            visited[tile, block] = key_least <= most and least <= key_most and bool(bits & key_bits)
        if not visited[tile].any() and family == "sm90":
            visited[tile, end_block - 1] = True
    return visited


DIMS = [(64, 64), (80, 80), (128, 128), (192, 128), (192, 192), (256, 256), (72, 200)]


@pytest.mark.parametrize("family", CUDA_TILES)
@given(cases(), st.sampled_from(DIMS))
def test_visited_blocks_are_those_of_the_cuda_kernel(family: str, case: tuple, dims: tuple[int, int]) -> None:
    ids, keys, rules = case
    sizes = next(sizes for most, sizes in CUDA_TILES[family].items() if dims[0] <= most[0] and dims[1] <= most[1])
    options = dict(kernels=family, head_dim=dims[0], v_head_dim=dims[1], **rules)
    report = selfattn.packing_report(ids, kv_segment_ids=keys, **options)
    key_rows = (ids if keys is None else keys).tolist()
    rows = zip(ids.tolist(), key_rows, strict=True)
    expected = torch.stack([visited_on_cuda(q, k, keys is not None, rules, sizes, family) for q, k in rows])
    assert report.visited_blocks == int(expected.sum()) and report.blocks == expected.numel()
    for row in range(len(ids)):
        assert torch.equal(report.packing.visited(slice(row, row + 1)).matrix(0), expected[row])


def with_signature_of(id: int, candidates: range) -> int:
    """Another id with the same bit of a signature."""
    return next(x for x in candidates if x != id and (x * 0x9E3779B1) % 2**32 >> 26 == (id * 0x9E3779B1) % 2**32 >> 26)


@pytest.mark.parametrize(("id", "neighbour", "candidates"), [(5, 6, range(8, 500)), (INT_MAX, INT_MAX - 1, range(500))])
def test_a_tile_of_one_id_and_padding_looks_like_two_ids(id: int, neighbour: int, candidates: range) -> None:
    """As prepare.cu has it, so that the tile does not pass for one without a mask. Its signature is not changed."""
    ids = torch.full((1, 256), id)
    ids[0, 100:128] = -1
    keys = torch.tensor([[neighbour, with_signature_of(id, candidates)] * 64 + [id] * 128])
    report = selfattn.packing_report(ids, kv_segment_ids=keys, causal=False)
    assert report.packing.visited(slice(0, 1)).matrix(0).tolist() == [[True, True], [False, True]]
    rules = {"causal": False, "window_left": -1, "window_right": -1}
    expected = visited_on_cuda(ids[0].tolist(), keys[0].tolist(), True, rules, (128, 128), "sm90")
    assert torch.equal(report.packing.visited(slice(0, 1)).matrix(0), expected)


SHIM = """
#include "cpu/pair_table.h"
using namespace selfattn::cpu;
extern "C" void visit(int64_t batch, int64_t query_length, int64_t key_length, int64_t group, bool is_causal,
                      int64_t left, int64_t right, const int32_t* query_ids, const int32_t* key_ids, bool* visited) {
  const PairTable table = make_pair_table({batch, query_length, key_length, group, is_causal, left, right, query_ids,
                                           key_ids});
  for (const QueryTile& tile : table.query_tiles)
    for (int64_t block = 0; block < table.blocks; ++block) *visited++ = table.may_meet(tile, block);
}
"""


@pytest.fixture(scope="module")
def pair_table(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CPU kernels' own table, compiled from its source."""
    folder = tmp_path_factory.mktemp("pair_table")
    (folder / "shim.cpp").write_text(SHIM)
    library = folder / "pair_table.so"
    sources = (folder / "shim.cpp", CSRC / "cpu" / "pair_table.cpp")
    run(tool("c++"), "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{CSRC}", *sources, "-o", library)
    return ctypes.CDLL(str(library))


@given(cases(), st.sampled_from([1, 2, 3, 8, 100]))
def test_visited_blocks_are_those_of_the_cpu_kernels_pair_table(
    pair_table: ctypes.CDLL, case: tuple, group: int
) -> None:
    ids, keys, rules = case
    options = dict(kernels="cpu", num_heads=2 * group, num_kv_heads=2, **rules)
    report = selfattn.packing_report(ids, kv_segment_ids=keys, **options)
    key_ids = ids if keys is None else keys
    shape = len(ids), -(-ids.shape[1] * group // CPU_TILE[0]), -(-key_ids.shape[1] // CPU_TILE[1])
    expected = torch.zeros(shape, dtype=torch.bool)
    query_data, key_data = ids.int().contiguous(), key_ids.int().contiguous()
    pair_table.visit(
        *(ctypes.c_int64(size) for size in (len(ids), ids.shape[1], key_ids.shape[1], group)),
        ctypes.c_bool(rules["causal"]),
        *(ctypes.c_int64(rules[side]) for side in ("window_left", "window_right")),
        *(ctypes.c_void_p(x.data_ptr()) for x in (query_data, key_data, expected)),
    )
    assert report.visited_blocks == int(expected.sum()) and report.blocks == expected.numel()
    for row in range(len(ids)):
        assert torch.equal(report.packing.visited(slice(row, row + 1)).matrix(0), expected[row])


def test_cuda_means_the_kernels_of_hopper() -> None:
    ids = packed(100, 200, padding=30)
    assert selfattn.packing_report(ids, kernels="cuda") == selfattn.packing_report(ids, kernels="sm90")
    assert selfattn.packing_report(ids, kernels="sm80").blocks != selfattn.packing_report(ids, kernels="sm90").blocks


@given(cases(), st.sampled_from(["sm90", "sm80", "cpu"]))
def test_every_allowed_pair_lies_in_a_visited_block(case: tuple, kernels: str) -> None:
    ids, keys, rules = case
    report = selfattn.packing_report(ids, kv_segment_ids=keys, kernels=kernels, **rules)
    tiling = report.packing.tiling
    tile = torch.arange(ids.shape[1]) // tiling.query_tile
    block = torch.arange(report.key_length) // tiling.key_block
    for row, mask in enumerate(allowed_mask(ids, ids if keys is None else keys, **rules)):
        assert bool(report.packing.visited(slice(row, row + 1)).matrix(0)[tile][:, block][mask].all())


def query_rows(family: str, body: str) -> int | None:
    """Rows of a query tile by the body of a ForwardTiles; None where it has the base's."""
    if family == "sm90":
        rows = re.search(r"kWarpgroups = (\d+)", body)
        return 64 * int(rows[1]) if rows else None
    warps, rows = (re.search(rf"{name} = (\d+)", body) for name in ("kWarps", "kWarpRows"))
    return int(warps[1]) * int(rows[1]) if warps and rows else None


@pytest.mark.parametrize("family", CUDA_TILES)
def test_tiles_are_those_in_the_sources(family: str) -> None:
    config = (CSRC / f"cuda/flash/{family}/forward/config.h").read_text()
    dispatch = (CSRC / f"cuda/flash/{family}/forward/dispatch.cu").read_text()
    of_sources = {}
    for qk, v, base_qk, base_v, body in re.findall(
        r"struct ForwardTiles<(\d+), (\d+)>(?: : ForwardTiles<(\d+), (\d+)>)? \{(.*?)\};", config, re.DOTALL
    ):
        base = of_sources.get((int(base_qk or 0), int(base_v or 0)), (0, 0))
        keys = re.search(r"kTileKey = (\d+)", body)
        of_sources[int(qk), int(v)] = query_rows(family, body) or base[0], int(keys[1]) if keys else base[1]
    assert of_sources == CUDA_TILES[family]
    order = [(int(qk), int(v)) for qk, v in re.findall(r"kernel_for<(\d+), (\d+)>\(\)", dispatch)]
    assert order == list(CUDA_TILES[family])


@pytest.mark.parametrize("kernels", ["cuda", *CUDA_TILES])
def test_head_dimensions_that_are_no_multiple_of_8_take_tiles_of_every_card(kernels: str) -> None:
    dispatch = (CSRC / "cuda/flash/sm80/forward/dispatch.cu").read_text()
    order = re.findall(r"kernel_for<(\d+), (\d+), false, RowLayout::kUnaligned>\(\)", dispatch)
    assert [(int(qk), int(v)) for qk, v in order] == list(UNALIGNED_DIMS)
    for dims, most in {(63, 64): (64, 64), (64, 1): (64, 64), (100, 96): (128, 128), (5, 256): (256, 256)}.items():
        assert Tiling.of(kernels, *dims, 1) == Tiling("sm80", *CUDA_TILES["sm80"][most], 1)


def test_tiles_of_the_cpu_are_those_in_the_source() -> None:
    table = (CSRC / "cpu/pair_table.h").read_text()
    constants = dict(re.findall(r"constexpr int64_t (\w+) = (\d+);", table))
    assert (int(constants["kTileRows"]), int(constants["kPanel"])) == CPU_TILE


def test_a_row_of_262144_tokens_needs_no_matrix_of_pairs() -> None:
    """As a matrix its pairs would take 64 GiB."""
    documents, length = 256, 1024
    ids = packed(*[length] * documents)
    report = selfattn.packing_report(ids)
    assert report.allowed_pairs == documents * length * (length + 1) // 2
    assert report.visited_blocks == documents * 8 * 9 // 2
    shuffled = ids.view(documents, length)[torch.randperm(documents)].view(1, -1)
    assert selfattn.packing_report(shuffled).allowed_pairs == report.allowed_pairs
    make_figure(report)


def test_flops_are_those_of_the_flop_counter_for_the_whole_square() -> None:
    ids = packed(100, 56, padding=100).repeat(2, 1)
    options = dict(num_heads=4, num_kv_heads=2, head_dim=24, v_head_dim=16)
    report = selfattn.packing_report(ids, **options)
    assert report.dense_flops == selfattn.flops.attention_flops((2, 256, 4, 24), (2, 256, 2, 24), (2, 256, 2, 16))
    assert report.allowed_flops * report.pairs == report.dense_flops * report.allowed_pairs
    assert report.visited_flops == report.visited_blocks * 4 * 192 * 128 * 2 * (24 + 16)
    on_cpu = selfattn.packing_report(ids, kernels="cpu", **options)
    assert on_cpu.visited_flops == on_cpu.visited_blocks * 2 * 64 * 64 * 2 * (24 + 16)


def test_key_ids_that_are_the_query_ids_count_as_none() -> None:
    ids = packed(100, 200)
    assert selfattn.packing_report(ids, kv_segment_ids=ids) == selfattn.packing_report(ids)
    assert selfattn.packing_report(ids, kv_segment_ids=ids.clone()).contiguous_rows == 1


@pytest.mark.parametrize(
    ("keys", "contiguous"),
    [
        (packed(70, 90, 40), 1),
        (packed(70, 90, 40)[:, 60:130], 1),
        (packed(70, 90, 40) * 7, 1),  # one id in common
        (packed(70, 90, 40).flip(1), 0),
        (torch.cat([packed(70, 90), packed(40)], 1), 0),  # an id that comes back
        (torch.cat([packed(70, 90), packed(40) + 9, packed(40) + 2, packed(40) + 9], 1), 1),  # none of the queries'
    ],
)
@pytest.mark.parametrize("kernels", ["sm90", "sm80"])
def test_key_ids_in_the_order_of_the_query_ids_are_intervals(keys: Tensor, contiguous: int, kernels: str) -> None:
    ids = packed(100, 200, 30, padding=9)
    assert selfattn.packing_report(ids, kv_segment_ids=keys, kernels=kernels).contiguous_rows == contiguous


def test_rows_beyond_shared_memory_are_no_intervals() -> None:
    """Of a card that gives a thread block 99 KB, and of Hopper."""
    for length, of_sm80 in ((32768, 1), (131072, 0)):
        ids = packed(length)
        report = {
            kernels: selfattn.packing_report(ids, kv_segment_ids=ids.clone(), kernels=kernels).contiguous_rows
            for kernels in ("sm80", "sm90")
        }
        assert report == {"sm80": of_sm80, "sm90": 1}


# ---------------------------------------------------------------- what looks wrong

POSITIONS = torch.cat([torch.arange(n) for n in (40, 7, 90, 63)])[None]
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(0, 150, (2, 400), generator=GENERATOR)

WRONG = {
    "all equal: every token has the id 7": torch.full((2, 50), 7),
    "all equal: every token that is not padding has the id 0": packed(30, padding=20),
    "the ids differ from row to row alone": torch.arange(3)[:, None].expand(3, 20),
    "all different": torch.randperm(200, generator=GENERATOR)[None] + 5,
    "torch.repeat_interleave": torch.tensor([512, 300, 7, 93]),
    "look like position_ids: they start at 0, in runs of + 1 that restart 3 times": POSITIONS,
    "look like position_ids: they start at 0, and count on": torch.arange(64)[None],
    "look like position_ids: they start at 1": POSITIONS + 1,
    "look like token ids": TOKENS,
    "sorted token ids": (TOKENS * 7).sort(1).values,
    "sorted position_ids": torch.cat([torch.arange(n) for n in (40, 17, 50, 33)]).sort().values[None],
    "looks like an attention mask": torch.tensor([[1] * 30 + [0] * 10, [1] * 40]),
    "an attention mask with padding on the left?": torch.tensor([[0] * 30 + [1] * 10, [0] * 20 + [1] * 20]),
    "a tensor of bool": torch.tensor([[True] * 30 + [False] * 10]),
    "torch.float32, and the operators take int32 or int64": packed(20, 30).float(),
    "Some are no integers": torch.tensor([[0.0, 0.5, 1.0, 1.0]]),
    "do not fit in int32": packed(20, 30).long() * 2**33,
    "cumulative lengths (cu_seqlens)": torch.tensor([0, 120, 200, 512, 700]),
    "cumulative lengths (cu_seqlens): 6 a row": torch.tensor([[0, 120, 200, 512, 512, 512]]),
    "one dimension and is read as one row": packed(20, 30)[0],
    "in which a document stands in several pieces: 1 times an id comes back": torch.tensor([[0, 0, 1, 1, 2, 0, 0]]),
    "1 times a document goes on behind padding": torch.tensor([[0, 0, -1, 0, 0, 1, 1, 1]]),
    "every id is negative": torch.full((2, 9), -100),
    "1 row (1) of padding alone": torch.cat([packed(4, 5), torch.full((1, 9), -1)]),
    "is 0 padding there?": torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3, 0, 0]]),
    "were the ids sorted by accident": packed(20, 30, padding=9).sort(1).values,
}


@pytest.mark.parametrize("note", WRONG)
def test_wrong_ids_are_named(note: str) -> None:
    report = selfattn.packing_report(WRONG[note])
    assert any(note in said for said in report.notes), report.notes
    assert note in str(report)


@pytest.mark.parametrize(
    "ids",
    [
        packed(100, 50, 3, 200, padding=20),
        torch.cat([packed(100, 28), packed(128)]),
        packed(100, 28).repeat(2, 1) + torch.tensor([[0], [2]], dtype=torch.int32),  # numbered through the batch
        packed(1, 1, 2, 1, 5, 1, 1, 3, padding=3),
        torch.tensor([[5, 5, 5, 3, 3, 4, 4, 4]]),  # numbered in another order
        torch.cat([packed(20, 30, padding=9), packed(59)]),
        packed(*[17, 3, 9, 25, 2, 30, 8, 12, 40, 5, 6, 19, 21, 14, 33, 7, 10, 11]),
    ],
)
def test_right_ids_are_not_found_fault_with(ids: Tensor) -> None:
    assert selfattn.packing_report(ids).notes == ()


def test_queries_without_keys_are_counted() -> None:
    report = selfattn.packing_report(packed(10, 20), kv_segment_ids=torch.zeros(1, 30, dtype=torch.int32))
    assert "20 queries that are not padding may attend to no key" in str(report)


def test_ids_beyond_int32_count_by_what_is_equal() -> None:
    ids = packed(20, 30, padding=5).long()
    report = selfattn.packing_report(torch.where(ids < 0, ids, ids * 2**40))
    assert report.allowed_pairs == selfattn.packing_report(ids).allowed_pairs and report.padding == 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(segment_ids=torch.zeros(1, 1, 4, 4)), ValueError, r"segment_ids must have the shape .* a mask of pairs"),
        (dict(segment_ids=torch.zeros(0, 4).int()), ValueError, "segment_ids must have the shape .* not empty"),
        (dict(segment_ids=[[0, 1]]), TypeError, "segment_ids must be a dense tensor .* got list"),
        (dict(segment_ids=torch.tensor([[0.0, float("nan")]])), ValueError, "not finite"),
        (dict(kv_segment_ids=torch.zeros(2, 4).int()), ValueError, "kv_segment_ids must have the batch size"),
        (dict(window_left=-2), ValueError, "window_left must be -1 .* got -2"),
        (dict(window_right=-5), ValueError, "window_right must be -1 .* got -5"),
        (dict(kernels="tpu"), ValueError, "kernels must be .* got 'tpu'"),
        (dict(head_dim=264), ValueError, "head_dim must be at most 256"),
        (dict(head_dim=0), ValueError, "head_dim must be at least 1"),
        (dict(num_heads=3, num_kv_heads=2), ValueError, "num_heads must be a multiple"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        selfattn.packing_report(**{"segment_ids": packed(3, 4), **arguments})


# ---------------------------------------------------------------- table, shell, picture


def test_table_holds_the_numbers() -> None:
    table = str(selfattn.packing_report(packed(100, 28, padding=128), window_left=9, num_heads=8))
    for part in [
        "Packed batch of 1 row of 256 tokens, causal, window_left 9",
        "padding  128 of 256 tokens (50.0%)",
        "Visited: 2 of 4 blocks of 128 queries x 128 keys, by the forward kernels for CUDA (sm90).",
        "8 query heads of dimension 128",
        "They take 1 of 1 row as intervals",
    ]:
        assert part in table
    assert re.search(r"documents a row +2 +2 +2\n", table) and re.search(r"document length +28 +64 +100  tokens", table)
    allowed = (10 * 11 // 2 + 90 * 10) + (10 * 11 // 2 + 18 * 10)
    assert re.search(rf"share of the score square +{allowed / 256**2:.2%} +50\.00%", table)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs the program in this process, and gives what it printed."""

    def call(*arguments: object) -> str:
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out.strip()

    return call


@pytest.fixture
def batch_file(tmp_path: Path) -> Path:
    path = tmp_path / "batch.pt"
    ids = packed(100, 28, padding=128)
    torch.save({"segment_ids": ids, "key_ids": ids[:, :200].clone(), "x": torch.ones(2)}, path)
    return path


def test_module_runs_from_the_shell_without_a_warning(batch_file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    command = [sys.executable, "-W", "error", "-m", "selfattn.packing_report", batch_file, "--picture", picture]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    table = str(selfattn.packing_report(torch.load(batch_file)["segment_ids"]))
    assert result.stdout == f"{table}\n\nPicture of row 0: {picture}\n"
    assert matplotlib.image.imread(picture).shape[2] == 4


def test_shell_prints_the_report_of_a_file(shell: Callable[..., str], batch_file: Path, tmp_path: Path) -> None:
    ids = torch.load(batch_file)["segment_ids"]
    torch.save(ids, tmp_path / "ids.pt")
    options = ["--no-causal", "--window-left", 7, "--window-right", 3, "--kernels", "cpu", "--head-dim", 64]
    options += ["--v-head-dim", 32, "--num-heads", 6, "--num-kv-heads", 2]
    report = selfattn.packing_report(ids, False, None, 7, 3, "cpu", 64, 32, 6, 2)
    assert shell(tmp_path / "ids.pt", *options) == str(report)
    own_keys = selfattn.packing_report(ids, kv_segment_ids=torch.load(batch_file)["key_ids"])
    assert shell(batch_file, "--kv-key", "key_ids") == str(own_keys)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"ids": torch.zeros(2, 3)}, [], "no entry 'segment_ids', choose one by --key; it has: ids (2, 3)"),
        ([torch.zeros(2, 3)], [], "must hold a tensor or a dictionary of tensors; got list"),
        (packed(4), ["--kv-key", "k"], "--kv-key asks for a dictionary"),
        (packed(4), ["--picture", "out.png", "--row", "1"], "row must be from 0 to 0; got 1"),
        (packed(4), ["--window-left", "-3"], "window_left must be -1"),
        ("text", [], "must hold a tensor or a dictionary of tensors; got str"),
    ],
)
def test_shell_says_what_is_wrong_with_a_file(content: object, options: list, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "batch.pt")
    with pytest.raises(SystemExit, match=re.escape(message)):
        main([str(tmp_path / "batch.pt"), *options])


def test_shell_says_that_a_file_is_none(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cannot be read"):
        main([str(tmp_path / "absent.pt")])
    (tmp_path / "text.pt").write_text("not tensors")
    with pytest.raises(SystemExit, match="is no file of tensors"):
        main([str(tmp_path / "text.pt")])


def colour_at(path: Path, report: PackingReport, query: float, key: float) -> tuple:
    """Of the picture's pixel at a place of the score square, in tokens."""
    figure, axes = make_figure(report)
    figure.savefig(path, dpi=150)
    pixels = matplotlib.image.imread(path)
    x, y = axes.transData.transform((key, query)) * 150 / figure.dpi
    return tuple(pixels[pixels.shape[0] - 1 - int(y), int(x), :3])


@pytest.mark.parametrize(
    ("query", "key", "colour"),
    [
        (250, 30, ALLOWED),  # in the first document
        (10, 30, VISITED),  # right of the diagonal, in its block
        (320, 150, VISITED),  # the second document's query, the first one's key, in a tile that holds both
        (10, 200, NOT_VISITED),  # right of every block
        (600, 150, NOT_VISITED),  # another document's tile
        (480, 400, ALLOWED),  # in the second document
        (960, 850, NOT_VISITED),  # a tile of padding visits its diagonal block alone
        (960, 940, VISITED),
    ],
)
def test_picture_shows_pairs_and_blocks(query: int, key: int, colour: tuple, tmp_path: Path) -> None:
    report = selfattn.packing_report(packed(300, 400, padding=324))
    assert colour_at(tmp_path / "picture.png", report, query, key) == pytest.approx(colour, abs=1 / 255)


@pytest.mark.parametrize(("kernels", "heads"), [("cuda", 1), ("sm80", 1), ("cpu", 3)])
@pytest.mark.parametrize("length", [200, 1900])
def test_picture_has_the_share_of_the_pairs_and_the_blocks_of_each_cell(kernels: str, heads: int, length: int) -> None:
    ids = torch.repeat_interleave(torch.randint(-1, 9, (length,)), torch.randint(1, 200, (length,)))[None, :length]
    rules = {"causal": True, "window_left": 300, "window_right": -1}
    report = selfattn.packing_report(ids, kernels=kernels, num_heads=heads, num_kv_heads=1, **rules)
    colours, cell = score_square(report, 0)
    tiling, token = report.packing.tiling, torch.arange(length)
    by_row_of_heads = report.packing.visited(slice(0, 1)).matrix(0)[
        torch.arange(length * tiling.group) // tiling.query_tile
    ]
    visited = by_row_of_heads[:, token // tiling.key_block].view(length, tiling.group, length).any(1)
    allowed = allowed_mask(ids, ids, **rules)[0]
    assert cell == -(-length // 900) and len(colours) == -(-length // cell)
    for row in range(0, len(colours), 7):
        for column in range(0, len(colours), 5):
            part = slice(row * cell, (row + 1) * cell), slice(column * cell, (column + 1) * cell)
            share = float(allowed[part].float().mean())
            weight = 0.6 + 0.4 * share if share else 0
            ground = torch.tensor(VISITED if bool(visited[part].any()) else NOT_VISITED)
            expected = ground + weight * (torch.tensor(ALLOWED) - ground)
            torch.testing.assert_close(colours[row, column], expected)


def test_picture_of_a_long_row_is_sampled_and_shows_its_documents(tmp_path: Path) -> None:
    report = selfattn.packing_report(packed(*[4096] * 8), causal=False)
    path = tmp_path / "picture.png"
    assert colour_at(path, report, 10_000, 9_000) == pytest.approx(ALLOWED, abs=1 / 255)
    assert colour_at(path, report, 10_000, 3_000) == pytest.approx(NOT_VISITED, abs=1 / 255)


def test_picture_of_queries_and_keys_of_two_lengths(tmp_path: Path) -> None:
    report = selfattn.packing_report(packed(100, 100), kv_segment_ids=packed(300, 500), causal=False)
    path = tmp_path / "picture.png"
    assert colour_at(path, report, 50, 100) == pytest.approx(ALLOWED, abs=1 / 255)
    assert colour_at(path, report, 150, 600) == pytest.approx(ALLOWED, abs=1 / 255)
    assert colour_at(path, report, 110, 100) == pytest.approx(VISITED, abs=1 / 255)


def test_without_matplotlib_the_report_prints_and_the_picture_says_what_is_missing(batch_file: Path) -> None:
    program = f"""
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
import torch, selfattn
report = selfattn.packing_report(torch.load({str(batch_file)!r})["segment_ids"])
print(report)
try:
    report.draw("never.png")
except ImportError as error:
    print(error)
"""
    printed = run(sys.executable, "-c", program)
    assert 'needs matplotlib; install it with pip install "selfattn[report]"' in printed and "Visited" in printed


def test_importing_selfattn_does_not_import_matplotlib() -> None:
    run(sys.executable, "-c", "import sys, selfattn; assert 'matplotlib' not in sys.modules")


def test_function_stays_callable_once_its_package_is_imported() -> None:
    import selfattn.packing_report.__main__

    assert callable(selfattn.packing_report)
