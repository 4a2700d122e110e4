"""Promise: the slots of a call's tokens and the lengths behind them are those of slow loops, for ids in any order,
integers of either width and any memory layout; on CUDA one kernel finds both, also in a captured graph, and values out
of range stop the device."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.kv_cache import positions_of_tokens, replays
from support.launches import launches
from torch import Tensor

import selfattn
from selfattn import KVCache, PageAllocator, SelfAttention, SelfAttentionConfig

OPS = torch.ops.selfattn
CAPACITY = 5000
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda integers: integers,
    "every_second": lambda integers: torch.stack([integers, 5 - integers], dim=-1)[..., 0],
    "transposed": lambda integers: integers.t().contiguous().t(),
    "behind_one": lambda integers: torch.cat([integers.new_zeros(1), integers.flatten()])[1:].view(integers.shape),
}
IDS = ("any_order", "runs", "one_row", "mostly_padding", "padding")
DTYPES = (torch.int32, torch.int64)


def make_ids(kind: str, rows: int, batch: int, columns: int, generator: torch.Generator) -> Tensor:
    def random(low: int) -> Tensor:
        return torch.randint(low, rows, (batch, columns), generator=generator)

    match kind:
        case "any_order":
            return random(-2)
        case "runs":
            return random(-1).flatten().sort(descending=rows % 2 == 0).values.view(batch, columns)
        case "one_row":
            return torch.full((batch, columns), rows - 1)
        case "mostly_padding":
            return torch.where(torch.rand(batch, columns, generator=generator) < 0.1, random(0), -3)
    return torch.full((batch, columns), -1)


def make(
    rows: int,
    columns: int,
    ids: str | None = None,
    batch: int = 1,
    gives_positions: bool = False,
    dtype: torch.dtype = torch.int32,
    layout: str = "contiguous",
    seed: int = 0,
) -> dict[str, Any]:
    """A call on the CPU; lengths are those before its tokens, and a row may be full after them."""
    generator = torch.Generator().manual_seed(seed)
    call: dict[str, Any] = {"num_tokens": columns}
    counts = torch.full((rows,), columns)
    if ids is not None:
        segment_ids = make_ids(ids, rows, batch, columns, generator)
        counts = torch.bincount(segment_ids[segment_ids >= 0], minlength=rows)
        call["segment_ids"] = LAYOUTS[layout](segment_ids.to(dtype))
    room = CAPACITY - counts
    lengths = (torch.rand(rows, generator=generator) * (room + 1)).long().clamp(max=room)
    call["lengths"] = torch.where(torch.rand(rows, generator=generator) < 0.2, room, lengths).to(dtype)
    if gives_positions:
        shape = (rows if ids is None else batch, columns)
        positions = torch.randint(-(2**31), 2**31, shape, generator=generator)
        call["positions"] = LAYOUTS[layout](positions.to(dtype))
    return call


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    return make(
        rows=draw(st.sampled_from([1, 2, 3, 40])),
        columns=draw(st.sampled_from([0, 1, 1, 2, 31, 33, 130, 300, 1100])),
        ids=draw(st.sampled_from([None, *IDS])),
        batch=draw(st.sampled_from([1, 2, 3])),
        gives_positions=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(list(LAYOUTS))),
        seed=draw(st.integers(0, 2**20)),
    )


def on(call: dict[str, Any], device: str) -> dict[str, Any]:
    """The same values in the same memory layout."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor) or device == "cpu":
            return value
        moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return moved.copy_(value)

    return {name: move(value) for name, value in call.items()}


def appended(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    arguments = (call["lengths"], call.get("segment_ids"), call["num_tokens"], CAPACITY, call.get("positions"))
    return OPS.positions_of_append(*arguments)


def in_loops(call: dict[str, Any]) -> tuple[list[int], list[list[int]]]:
    ids = call.get("segment_ids")
    batch = len(call["lengths"]) if ids is None else len(ids)
    rows = [row for row in range(batch) for _ in range(call["num_tokens"])] if ids is None else ids.flatten().tolist()
    counts = Counter(rows)
    after = [int(length) + counts[row] for row, length in enumerate(call["lengths"])]
    of = call | {"lengths": torch.tensor(after), "q": torch.zeros(batch, call["num_tokens"], 1, 1)}
    return after, positions_of_tokens(of)


def check(call: dict[str, Any], device: str) -> None:
    """Both operators."""
    there = on(call, device)
    lengths, positions = appended(there)
    assert lengths.dtype == call["lengths"].dtype and positions.dtype == torch.int64
    expected_lengths, expected_positions = in_loops(call)
    assert lengths.tolist() == expected_lengths
    assert positions.tolist() == expected_positions
    for kind in DTYPES:
        by_lengths = selfattn.kv_cache_positions(
            lengths.to(kind), there.get("segment_ids"), call["num_tokens"], CAPACITY, there.get("positions")
        )
        assert torch.equal(by_lengths, positions)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(call=calls())
def test_random_calls(device: str, call: dict[str, Any]) -> None:
    check(call, device)


@pytest.mark.parametrize("ids", [None, *IDS])
@pytest.mark.parametrize("columns", [4000, 20_000])
def test_many_tokens(columns: int, ids: str | None, device: str) -> None:
    if columns > CAPACITY and ids in (None, "one_row"):
        return  # more than a row holds
    for layout in LAYOUTS:
        check(make(rows=7, columns=columns, ids=ids, layout=layout, dtype=torch.int64), device)


@pytest.mark.parametrize("rows", [300, 5000])
def test_many_rows(rows: int, device: str) -> None:
    for ids in (None, "any_order", "mostly_padding"):
        check(make(rows=rows, columns=4 if ids is None else 500, ids=ids), device)


def test_no_rows(device: str) -> None:
    lengths, positions = appended(on(make(rows=0, columns=3), device))
    assert lengths.shape == (0,) and positions.shape == (0, 3)


def test_expanded_lengths(device: str) -> None:
    lengths = torch.tensor([7], device=device).expand(3)
    after, positions = OPS.positions_of_append(lengths, None, 2, 9)
    assert after.tolist() == [9, 9, 9] and positions.tolist() == [[7, 8]] * 3
    assert lengths.tolist() == [7, 7, 7]


# ---------------------------------------------------------------- on a GPU alone


@pytest.mark.gpu
@pytest.mark.parametrize("ids", [None, "any_order", "runs", "mostly_padding"])
@pytest.mark.parametrize("columns", [1, 700])
def test_a_graph_is_replayed_with_other_lengths_and_ids(columns: int, ids: str | None) -> None:
    host = [make(rows=5, columns=columns, ids=ids, batch=2, seed=seed) for seed in range(4)]
    for i, (_, (lengths, positions)) in enumerate(replays(appended, [on(call, "cuda") for call in host])):
        expected = in_loops([*host, *reversed(host)][i])
        assert (lengths.tolist(), positions.tolist()) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("gives_positions", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids", [None, "any_order"])
@pytest.mark.parametrize("columns", [1, 300])
def test_one_kernel_does_it(columns: int, ids: str | None, dtype: torch.dtype, gives_positions: bool) -> None:
    call = make(rows=3, columns=columns, ids=ids, dtype=dtype, gives_positions=gives_positions, layout="every_second")
    there = on(call, "cuda")
    after, _ = appended(there)
    arguments = (there.get("segment_ids"), columns, CAPACITY, there.get("positions"))
    for names in (
        launches(lambda: appended(there)),
        launches(lambda: selfattn.kv_cache_positions(after, *arguments)),
    ):
        assert len(names) == 1 and "kv_cache_positions_kernel" in names[0], names


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"qk_norm": True, "num_kv_heads": 2},
    "neither": {"rope": False},
    "window_softcap": {"window_left": 30, "softcap": 20.0},
    "bias": {"use_bias": True, "qk_scale": 0.1},
    "sinks": {"sinks": True},
}
KERNELS_OF_A_STEP = ("kv_cache_positions_kernel", "qk_norm_rope_append_kernel", "flash_attention_kv_cache_kernel")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "paged", "ragged"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
@torch.no_grad()
def test_a_layer_launches_its_products_and_few_kernels(options: dict[str, Any], kind: str) -> None:
    rows, width, placed = 3, 256, {"device": "cuda", "dtype": torch.bfloat16}
    config = SelfAttentionConfig(head_dim=64, attention_backend="flash", **options)
    layer = SelfAttention(width, config, **placed).eval()
    sizes = {"num_kv_heads": layer.num_kv_heads, "head_dim": 64, **placed}
    if kind == "dense":
        cache = KVCache.dense(1, rows, 128, **sizes)
    else:
        cache = KVCache.paged(1, rows * 8, 16, max_sequences=rows, max_length=128, **sizes)
        allocator = PageAllocator(cache)
        for row in range(rows):
            allocator.reserve(row, 128)
    cache.lengths.copy_(torch.tensor([5, 90, 0]))
    x, ids = torch.randn(rows, 1, width, **placed), None
    if kind == "ragged":
        x, ids = x.transpose(0, 1).contiguous(), torch.tensor([[2, 0, -1]], device="cuda")
    projections = [layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj]  # the last one's input has x's shape, too
    products = Counter(launches(lambda: [projection(x) for projection in projections]))
    names = launches(lambda: layer(x, segment_ids=ids, cache=cache.layer(0)))
    own = [name for name in names if "selfattn" in name]
    kernels = list(KERNELS_OF_A_STEP)
    if kind == "ragged" or torch.cuda.get_device_capability() < (9, 0):
        kernels.append("prepare_kv_cache_kernel")  # what clusters of thread blocks do without
    for kernel in kernels:
        assert len([name for name in own if kernel in name]) == 1, (kernel, names)
    assert len(own) == len(kernels), names
    assert Counter(name for name in names if "selfattn" not in name) == products, (names, products)


LENGTHS_MESSAGE = "lengths must hold values from 0 to the slots of a row of the cache"
OUT_OF_RANGE = {
    "lengths[1] = -3": LENGTHS_MESSAGE,
    "lengths[0] = 65": LENGTHS_MESSAGE,
    "lengths[0] = 2**31": LENGTHS_MESSAGE,
    "segment_ids[0, 1] = 2": "segment_ids must hold rows of the cache",
    "positions[0, 0] = 2**31": "positions must hold values that fit in int32",
    "positions[0, 1] = -2**31 - 1": "positions must hold values that fit in int32",
}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("operator", ["kv_cache_positions", "positions_of_append"])
@pytest.mark.parametrize("gives_ids", [False, True])
@pytest.mark.parametrize(("change", "message"), OUT_OF_RANGE.items())
def test_values_out_of_range_stop_the_device(change: str, message: str, gives_ids: bool, operator: str) -> None:
    """In a process of its own: nothing runs on the device after it."""
    if "segment_ids" in change and not gives_ids:
        return
    program = f"""
import torch, selfattn
lengths = torch.tensor([2, 40], device="cuda")
segment_ids = torch.tensor([[0, 1], [-1, 1]], device="cuda") if {gives_ids} else None
positions = torch.tensor([[3, 4], [5, 6]], device="cuda")
torch.ops.selfattn.{operator}(lengths, segment_ids, 2, 64, positions)
torch.cuda.synchronize()
print("ready", flush=True)
{change}
torch.ops.selfattn.{operator}(lengths, segment_ids, 2, 64, positions if "positions" in "{change}" else None)
torch.cuda.synchronize()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    output = run.stdout + run.stderr
    assert run.returncode != 0, output
    assert "ready" in output and message in output, output
