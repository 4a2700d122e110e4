"""CUDA flash with positions: the tokens of either side are brought into their order, and what a query may see is an
interval of them. By the family, too, that SELFATTN_FLASH_FAMILY forces."""

import math
from functools import partial

import pytest
import torch
from support.cases import CudaCase, long
from support.memory import peak_of, poison_free_memory
from support.problems import dense_attention, documents, norm_error, zigzag
from torch import Tensor

import selfattn

pytestmark = pytest.mark.gpu

OPS = torch.ops.selfattn
DIMS = (64, 128, 256)
KINDS = (
    "index",
    "zigzag",
    "gathered",
    "restarting",
    "cache",
    "any",
    "permuted",
    "extreme",
    "extreme_in_order",
    "future",
)
WINDOWS = ({}, {"window_left": 40}, {"causal": False, "window_left": 30, "window_right": 20})


def case(positions: str, num_keys: int = 450, **fields: object) -> CudaCase:
    return CudaCase(positions=positions, num_keys=num_keys, **fields)


CASES = [
    *(case(kind, dim=dim, **window) for kind in KINDS for dim in DIMS for window in WINDOWS),
    *(
        case(kind, dim=dim, ids=ids, has_kv_ids=True, **window)
        for kind in ("index", "zigzag", "any", "restarting")
        for ids in ("packed", "shuffled_padding", "mixed_padding")
        for dim in DIMS
        for window in WINDOWS
    ),
    *(case("future", dim=dim) for dim in DIMS),
    *(case("alike", num_keys=300, ids=ids, dim=dim) for ids in (None, "shuffled", "documents") for dim in DIMS),
    *(case("permuted", nk, num_queries=nq) for nq, nk in ((1, 500), (500, 1), (63, 65), (128, 128), (200, 1000))),
    *(case("zigzag", ids="packed", has_kv_ids=True, has_sinks=True, has_grad_lse=True, dim=dim) for dim in DIMS),
    *(case("permuted", softcap=4.0, has_grad_lse=True, dim=dim) for dim in DIMS),
    *(case("permuted", dtype=dtype, dim=dim) for dtype in (torch.float16, torch.float32) for dim in (*DIMS, 99)),
    *(case("zigzag", layout=layout, num_heads=8, num_kv_heads=1) for layout in ("bnsd", "surrounded", "odd")),
    *(case("permuted", dim=dim, value_dim=v) for dim, v in ((96, 96), (192, 128), (40, 72), (63, 5))),
    case("permuted", qk_scale=-0.05),
    # Other forms of the backward kernels, and several of their launches.
    *(
        long(nq, nk, positions=kind, dim=dim, **window)
        for kind in ("gathered", "permuted")
        for nq, nk in ((1500, 2900), (2700, 2700))
        for dim in (64, 128)
        for window in WINDOWS[:2]
    ),
    *(case("permuted", 700, batch=48, num_queries=640, num_heads=8, num_kv_heads=4, dim=dim) for dim in DIMS),
]


def check(problem: CudaCase, repeats: int = 0) -> None:
    """out and lse, and the gradients from those of the formula, against the formula in float64: no worse than the same
    formula in the kernels' precision. Rows without a pair are zeros. Results of further calls have the same bits."""
    tensors, grads = problem.tensors(device="cuda"), problem.grads(device="cuda")
    call = {"grad_lse": None, **tensors, **grads, **problem.options}
    exact, peers = dense_attention(**call), dense_attention(**call, precision=torch.float32, rounding=problem.dtype)
    allowed = problem.allowed(tensors)
    sees, is_seen = allowed.any(-1)[:, 0], allowed.any(-2)[:, 0]
    forward = partial(OPS.flash_attention, **tensors, **problem.options)
    saved = {"out": exact["out"].to(problem.dtype), "lse": exact["lse"].float()}
    call.pop("sinks", None)
    backward = partial(OPS.flash_attention_backward, **call, **saved)
    poison_free_memory()
    out, lse = forward()
    finite = exact["lse"].isfinite()
    assert torch.equal(lse.isfinite(), finite) and (lse[~finite] == -math.inf).all()
    if finite.any():
        assert (lse.double() - exact["lse"])[finite].abs().max() < 1e-3
    gradients = backward()
    results = {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
    for (name, mine), used in zip(results.items(), (sees, sees, is_seen, is_seen), strict=True):
        assert mine.isfinite().all(), f"{name} is not finite"
        assert (mine[~used] == 0).all(), f"{name}: rows without a pair are not zero"
        error, allowance = ((x.double() - exact[name]).square().mean().sqrt().item() for x in (mine, peers[name]))
        assert error <= 2 * allowance + 2e-5, f"{name}: error {error:.2e}, same-precision formula {allowance:.2e}"
    for _ in range(repeats):
        assert all(torch.equal(a, b) for a, b in zip((out, lse, *gradients), (*forward(), *backward()), strict=True))


@pytest.mark.parametrize("problem", CASES, ids=str)
def test_results_and_gradients_match_float64(problem: CudaCase) -> None:
    check(problem)


@pytest.mark.parametrize(
    "problem",
    [
        *(case("any", ids="shuffled_padding", has_kv_ids=True, dim=dim, window_left=2) for dim in DIMS),
        *(long(2700, positions="zigzag", dim=dim) for dim in DIMS),
        case("permuted", dtype=torch.float32),
    ],
    ids=str,
)
def test_deterministic_results_repeat(problem: CudaCase, deterministic: None) -> None:
    check(problem, repeats=3)


@pytest.mark.parametrize("has_ids", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_tokens_that_are_in_order_stay_where_they_are(dim: int, has_ids: bool, deterministic: None) -> None:
    """Bits, and no copies, of a shard's queries beside the keys of a row."""
    length, heads = 4096, (8, 2, 2)
    row = torch.arange(length, dtype=torch.int32, device="cuda").expand(2, length)
    ids = documents(2, length, 500).int().cuda() if has_ids else None
    own = zigzag(length).cuda()[: length // 2]
    q, k, v = (torch.randn(2, length, n, dim, device="cuda").bfloat16() for n in heads)
    q, grad = q[:, own].contiguous(), torch.randn(2, len(own), heads[0], dim, device="cuda").bfloat16()
    call = {"q": q, "k": k, "v": v, "positions": row[:, own], "kv_positions": row}
    call |= {"segment_ids": ids[:, own], "kv_segment_ids": ids} if has_ids else {}

    def run(in_order: bool) -> list[Tensor]:
        out, lse = OPS.flash_attention(**call, in_order=in_order)
        backward = partial(OPS.flash_attention_backward, grad, None, out=out, lse=lse, in_order=in_order)
        return [out, lse, *backward(**call)]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))
    peaks = [peak_of(lambda is_in_order=is_in_order: run(is_in_order)) for is_in_order in (True, False)]
    assert peaks[0] + 2 * (q.numel() + k.numel() + v.numel()) < peaks[1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_and_positions_of_either_width(dtype: torch.dtype) -> None:
    problem = case("zigzag", ids="shuffled_padding", has_kv_ids=True)
    tensors = problem.tensors(device="cuda")
    wide = {
        name: tensor.to(dtype) if "ids" in name or "positions" in name else tensor for name, tensor in tensors.items()
    }
    for one, other in zip(OPS.flash_attention(**wide), OPS.flash_attention(**tensors), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["zigzag", "permuted"])
def test_gradients_over_the_inputs_are_the_same(kind: str) -> None:
    problem = case(kind, num_keys=300, ids="shuffled", has_kv_ids=True)
    tensors, grads = problem.tensors(device="cuda"), problem.grads(device="cuda")
    out, lse = OPS.flash_attention(**tensors)
    wanted = OPS.flash_attention_backward(grad_lse=None, **grads, **tensors, out=out, lse=lse)
    dq, dk, dv = out.clone(), tensors["k"].clone(), tensors["v"].clone()
    inputs = {**tensors, "k": dk, "v": dv, "out": dq, "lse": lse}
    OPS.flash_attention_backward.into(grad_lse=None, **grads, **inputs, dq=dq, dk=dk, dv=dv)
    for found, expected in zip((dq, dk, dv), wanted, strict=True):
        assert norm_error(found, expected) < 1e-3


def test_a_graph_takes_other_ids_and_positions() -> None:
    problem = case("zigzag", ids="packed", has_kv_ids=True, num_queries=500, num_keys=900)
    tensors, grads = problem.tensors(device="cuda"), problem.grads(device="cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def run() -> dict[str, Tensor]:
        out, lse = OPS.flash_attention(**tensors)
        gradients = OPS.flash_attention_backward(grad_lse=None, **grads, out=out, lse=lse, **tensors)
        return {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        found = run()
    for ids, positions in (("shuffled", "any"), ("packed", "index"), ("mixed_padding", "permuted")):
        fresh = problem.with_(ids=ids, positions=positions).tensors(device="cuda")
        for name in ("segment_ids", "kv_segment_ids", "positions", "kv_positions"):
            tensors[name].copy_(fresh[name])
        graph.replay()
        torch.cuda.synchronize()
        exact = dense_attention(**tensors, **grads)
        for name, mine in found.items():
            assert norm_error(mine, exact[name]) < 1e-2, (ids, positions, name)


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_of_a_long_row_are_the_row(ranks: int) -> None:
    """As context parallelism deals them, against the call of the whole row without positions."""
    length = 8192
    q, k, v = (torch.randn(1, length, heads, 128, device="cuda").bfloat16() for heads in (8, 2, 2))
    ids = documents(1, length, 1500).int().cuda()
    whole = selfattn.multihead_attention(q, k, v, ids, backend="flash")
    order = zigzag(length, ranks).cuda()
    row = order.int()[None]
    for tokens in order.chunk(ranks):
        out = selfattn.multihead_attention(
            q[:, tokens],
            k[:, order],
            v[:, order],
            ids[:, tokens],
            kv_segment_ids=ids[:, order],
            positions=tokens.int()[None],
            kv_positions=row,
            backend="flash",
        )
        assert norm_error(out, whole[:, tokens]) < 1e-2


@pytest.mark.parametrize("length", [100_000, 400_000])
def test_very_long_rows(length: int) -> None:
    """Beyond what shared memory holds of runs: windows of a permuted row, against slices of the row in order."""
    window, dim = 500, 64
    q, k, v = (torch.randn(1, length, 1, dim, device="cuda").bfloat16() for _ in range(3))
    place = torch.randperm(length, device="cuda")
    out = selfattn.multihead_attention(
        q[:, place], k[:, place], v[:, place], positions=place[None], window_left=window, backend="flash"
    )
    there = torch.empty_like(out)
    there[:, place] = out
    for last in (700, length // 2, length):
        first = max(last - 1200, 0)
        slices = (tensor[:, first:last] for tensor in (q, k, v))
        exact = dense_attention(*slices, window_left=window)["out"][:, window if first else 0 :]
        assert norm_error(there[:, last - exact.shape[1] : last], exact) < 1e-2, last


def test_memory_grows_with_the_tokens() -> None:
    length = 32_768
    q, k, v = (torch.randn(1, length, 4, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    positions = torch.randperm(length, device="cuda")[None]
    call = partial(selfattn.multihead_attention, q, k, v, positions=positions, backend="flash")
    grad = torch.randn_like(call())
    assert peak_of(lambda: torch.autograd.grad(call(), (q, k, v), grad)) < 30 * 2 * q.numel()  # a mask: 64 times
