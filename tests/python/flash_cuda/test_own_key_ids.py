"""Key ids of their own that come in the order of the query ids, as a slice of a row has them beside the whole row: each
query's keys are an interval to the CUDA kernels, and each key's queries. Runs as well by the family that
SELFATTN_FLASH_FAMILY forces."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support.cases import CudaCase
from support.memory import poison_free_memory
from support.problems import dense_attention, documents, names, norm_error
from torch import Tensor

import selfattn

pytestmark = pytest.mark.gpu

OPS = torch.ops.selfattn
DIMS = (64, 128, 256)
LONELY = (2**31 - 1, 2**31 - 2)
"""Ids that only queries, only keys have."""


def stretched(runs: list[int], length: int) -> Tensor:
    """(length,) runs of these ids, each of some tokens; as many of them as there are tokens for."""
    runs = runs[:length] or [-1]
    ends = torch.cat([torch.randperm(length - 1)[: len(runs) - 1].sort().values + 1, torch.tensor([length])])
    return torch.repeat_interleave(torch.tensor(runs), ends.diff(prepend=torch.tensor([0])))


def with_gaps(ids: list[int], share: float, between: list[int]) -> list[int]:
    """That share of the ids, in their order, and what lies between some of them."""
    runs = []
    for id in ids:
        if torch.rand(()) < 0.3 and between:
            runs.append(between[len(runs) % len(between)])
        if torch.rand(()) < share:
            runs.append(id)
    return runs


def ids_of_row(pattern: str, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    length, shorter = max(num_queries, num_keys), min(num_queries, num_keys)
    ids = list(range(3, 4 + shorter // 30))
    match pattern:
        case "slice":  # a part of a row beside the whole row
            whole = documents(1, length, 60)[0]
            whole[whole % 5 == 0] = -1
            first = int(torch.randint(0, length - shorter + 1, ()))
            parts = {num: whole[first : first + num] if num == shorter else whole for num in (num_queries, num_keys)}
            return parts[num_queries], parts[num_keys]
        case "first_slice":  # whose last keys no query needs, and the other way round
            whole = documents(1, length, 60)[0]
            return whole[:num_queries], whole[:num_keys]
        case "other_lengths":
            runs = [with_gaps(ids, 1.0, []) for _ in range(2)]
        case "missing":  # some ids on one side alone, padding between
            runs = [with_gaps(ids, 0.7, [-1, -5]) for _ in range(2)]
        case "named":
            runs = [with_gaps(names(torch.tensor(ids)).tolist(), 0.8, [-1]) for _ in range(2)]
        case "lonely":  # ids that come back, but on one side alone
            runs = [with_gaps(ids, 0.8, [id, -1]) for id in LONELY]
        case "apart":  # no id in common
            runs = [with_gaps(list(range(first, 50, 2)), 1.0, []) for first in range(2)]
        case "padding_ahead":
            runs = [[-1, -1, -1, *ids], [*ids, -1, -1, -1]]
        case "no_keys":
            runs = [ids, []]
        case "no_queries":
            runs = [[], ids]
        case "backwards":  # no intervals: ids are compared
            runs = [ids, ids[::-1]]
        case "comes_back":  # likewise
            runs = [[*ids, ids[0]], ids]
        case _:
            raise ValueError(pattern)
    return stretched(runs[0], num_queries), stretched(runs[1], num_keys)


PATTERNS = ("slice", "first_slice", "other_lengths", "missing", "named", "lonely", "apart", "padding_ahead")
MIXED = ("missing", "backwards", "no_keys", "named", "comes_back", "no_queries", "slice")


@dataclass(frozen=True)
class PairCase(CudaCase):
    ids: str | None = None
    patterns: tuple[str, ...] = ("slice",)  # of one row after another

    def tensors(self, dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Tensor]:
        rows = [
            ids_of_row(self.patterns[row % len(self.patterns)], self.num_queries, self.num_keys)
            for row in range(self.batch)
        ]
        ids, kv_ids = (torch.stack(side).int().to(device) for side in zip(*rows, strict=True))
        return super().tensors(dtype, device) | {"segment_ids": ids, "kv_segment_ids": kv_ids}

    def __str__(self) -> str:
        rest = super().__str__().partition("-patterns=")[0].partition("patterns=")[0]
        return "-".join(filter(None, ("+".join(self.patterns), rest)))


def pair(*patterns: str, num_queries: int = 300, num_keys: int = 450, **fields: object) -> PairCase:
    return PairCase(patterns=patterns, num_queries=num_queries, num_keys=num_keys, **fields)


CASES = [
    *(pair(pattern, dim=dim, causal=causal) for pattern in PATTERNS for dim in DIMS for causal in (True, False)),
    *(
        pair(pattern, num_queries=nq, num_keys=nk, causal=causal)
        for pattern in ("slice", "missing", "lonely")
        for nq, nk in ((1, 500), (500, 1), (63, 65), (128, 128), (200, 1000), (1000, 200))
        for causal in (True, False)
    ),
    *(pair(*MIXED, batch=7, dim=dim, causal=causal) for dim in DIMS for causal in (True, False)),
    *(pair("missing", dim=dim, window_left=60, window_right=20, causal=False) for dim in DIMS),
    *(pair("slice", dim=dim, window_left=100, num_heads=8, num_kv_heads=1) for dim in DIMS),
    *(pair("missing", dim=dim, softcap=4.0, has_grad_lse=True, causal=False) for dim in DIMS),
    *(pair("named", dim=dim, has_grad_lse=True, dtype=torch.float16, layout="bnsd") for dim in DIMS),
    *(pair("slice", dim=dim, value_dim=v) for dim, v in ((96, 96), (192, 128), (192, 192), (40, 72))),
    *(
        pair("missing", "slice", dim=dim, dtype=torch.float32, causal=causal)
        for dim in DIMS
        for causal in (True, False)
    ),
    # Rows that another form of the backward kernels takes, and several of their launches.
    *(
        pair(pattern, num_queries=nq, num_keys=nk, batch=1, dim=dim, causal=causal)
        for pattern in ("first_slice", "padding_ahead")
        for nq, nk in ((1500, 2900), (2900, 1500), (2700, 2700))
        for dim in (64, 128)
        for causal in (True, False)
    ),
    *(
        pair("missing", "named", batch=48, num_queries=640, num_keys=700, num_heads=8, num_kv_heads=4, dim=dim)
        for dim in DIMS
    ),
]


def check(problem: PairCase, repeats: int = 0) -> None:
    """out and lse, and the gradients from those of the formula, against the formula in float64: no worse than the same
    formula in the kernels' precision. Rows without a pair are zeros. Gradients of further calls have the same bits."""
    tensors, grads = problem.tensors(device="cuda"), problem.grads(device="cuda")
    call = {"grad_lse": None, **tensors, **grads, **problem.options}
    forward_call = {**tensors, **problem.options}
    exact, peers = dense_attention(**call), dense_attention(**call, precision=torch.float32, rounding=problem.dtype)
    allowed = problem.allowed(tensors)
    sees, is_seen = allowed.any(-1)[:, 0], allowed.any(-2)[:, 0]
    poison_free_memory()
    out, lse = OPS.flash_attention(**forward_call)
    finite = exact["lse"].isfinite()
    assert torch.equal(lse.isfinite(), finite) and (lse[~finite] == -math.inf).all()
    if finite.any():
        assert (lse.double() - exact["lse"])[finite].abs().max() < 1e-3
    saved = {"out": exact["out"].to(problem.dtype), "lse": exact["lse"].float()}
    backward = lambda: OPS.flash_attention_backward(**call, **saved)  # noqa: E731
    gradients = backward()
    results = {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
    for (name, mine), used in zip(results.items(), (sees, sees, is_seen, is_seen), strict=True):
        assert mine.isfinite().all(), f"{name} is not finite"
        assert (mine[~used] == 0).all(), f"{name}: rows without a pair are not zero"
        error, allowance = ((x.double() - exact[name]).square().mean().sqrt().item() for x in (mine, peers[name]))
        assert error <= 2 * allowance + 2e-5, f"{name}: error {error:.2e}, same-precision formula {allowance:.2e}"
    for _ in range(repeats):
        assert all(torch.equal(a, b) for a, b in zip(gradients, backward(), strict=True))


@pytest.mark.parametrize("pattern", (*PATTERNS, *MIXED))
def test_patterns_are_what_they_say(pattern: str) -> None:
    """The report knows which rows are intervals to the kernels."""
    for num_queries, num_keys in ((300, 450), (450, 300), (1500, 2900)):
        ids = pair(pattern, num_queries=num_queries, num_keys=num_keys, batch=5).tensors()
        report = selfattn.packing_report(ids["segment_ids"], kv_segment_ids=ids["kv_segment_ids"], kernels="cuda")
        assert report.contiguous_rows == (0 if pattern in ("backwards", "comes_back") else 5)


@pytest.mark.parametrize("problem", CASES, ids=str)
def test_results_and_gradients_match_float64(problem: PairCase) -> None:
    check(problem)


@pytest.mark.parametrize(
    "problem",
    [
        *(pair(pattern, num_queries=900, num_keys=1500, dim=dim, num_heads=8) for pattern in PATTERNS for dim in DIMS),
        *(pair(*MIXED, batch=7, num_queries=1500, num_keys=900, dim=dim, causal=False) for dim in DIMS),
        *(pair("missing", batch=48, num_queries=640, num_keys=500, num_heads=8, num_kv_heads=4, dim=d) for d in DIMS),
        pair("missing", dtype=torch.float32, num_queries=700),
    ],
    ids=str,
)
def test_deterministic_gradients_match_float64_and_repeat(problem: PairCase, deterministic: None) -> None:
    check(problem, repeats=3)


def leaves(length: int, dim: int = 64, batch: int = 2, device: str = "cuda") -> list[Tensor]:
    return [torch.randn(batch, length, n, dim, device=device).bfloat16().requires_grad_() for n in (4, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("length", [1, 250, 4096, 40_000])
def test_a_copy_of_the_ids_gives_the_bits_of_the_ids(length: int, dtype: torch.dtype, deterministic: None) -> None:
    ids = documents(2, length, 200)
    ids[ids % 5 == 0] = -1
    ids[1] = torch.where(ids[1] < 0, ids[1], names(ids[1]))
    ids = ids.to("cuda", dtype)
    heads = leaves(length)

    def results(keys: Tensor | None) -> list[Tensor]:
        out = selfattn.multihead_attention(*heads, ids, backend="flash", kv_segment_ids=keys)
        return [out, *torch.autograd.grad(out, heads, out.detach().roll(1, -1))]

    apart = torch.stack([ids, ids], -1)[..., 1]  # two steps from token to token
    for keys in (ids.clone(), apart):
        assert all(torch.equal(a, b) for a, b in zip(results(keys), results(None), strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", DIMS)
def test_slices_of_the_queries_give_the_row(dim: int, causal: bool, deterministic: None) -> None:
    """As context parallelism has them: each part of the queries beside all keys that it may see."""
    length, parts = 3000, 4
    heads = leaves(length, dim)
    ids = documents(2, length, 150)
    ids[:, 700:900] = -1
    ids = ids.int().cuda()

    def results(attend: Callable[[], Tensor]) -> list[Tensor]:
        out = attend()
        return [out, *torch.autograd.grad(out, heads, out.detach().roll(1, -1))]

    def in_slices() -> Tensor:
        q, k, v = heads
        outs = []
        for part in torch.arange(length).tensor_split(parts):
            tokens, seen = slice(part[0], part[-1] + 1), slice(0, part[-1] + 1 if causal else length)
            masks = {"causal": causal, "kv_segment_ids": ids[:, seen], "backend": "flash"}
            outs.append(selfattn.multihead_attention(q[:, tokens], k[:, seen], v[:, seen], ids[:, tokens], **masks))
        return torch.cat(outs, 1)

    whole = results(lambda: selfattn.multihead_attention(*heads, ids, causal, backend="flash"))
    for name, one, other in zip(("out", "dq", "dk", "dv"), results(in_slices), whole, strict=True):
        assert norm_error(one, other) < 1e-2, name


def test_a_graph_goes_from_intervals_to_ids_and_back() -> None:
    problem = pair("slice", batch=2, num_queries=500, num_keys=900)
    tensors, grads = problem.tensors(device="cuda"), problem.grads(device="cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def run() -> dict[str, Tensor]:
        out, lse = OPS.flash_attention(**tensors)
        gradients = OPS.flash_attention_backward(grads["grad_out"], None, out=out, lse=lse, **tensors)
        return {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        found = run()
    for pattern in ("missing", "backwards", "lonely", "comes_back", "slice"):
        fresh = pair(pattern, num_queries=500, num_keys=900).tensors(device="cuda")
        for name in ("segment_ids", "kv_segment_ids"):
            tensors[name].copy_(fresh[name])
        graph.replay()
        torch.cuda.synchronize()
        exact = dense_attention(**tensors, **grads)
        for name, mine in found.items():
            assert norm_error(mine, exact[name]) < 1e-2, (pattern, name)


@pytest.mark.parametrize("keys", [70_000, 131_072, 300_000])
def test_a_slice_beside_a_very_long_row(keys: int, deterministic: None) -> None:
    """Also where shared memory holds a smaller table of runs, or not the runs of both sides."""
    whole = documents(1, keys, 700)[0]
    first, queries = keys // 3, 20_000
    q, grad = (torch.randn(1, queries, 2, 64, device="cuda").bfloat16() for _ in range(2))
    k, v = (torch.randn(1, keys, 1, 64, device="cuda").bfloat16() for _ in range(2))
    ids, kv_ids = (part.int().cuda()[None] for part in (whole[first : first + queries], whole))
    out, lse = OPS.flash_attention(q, k, v, ids, False, kv_segment_ids=kv_ids)
    dq, dk, dv = OPS.flash_attention_backward(grad, None, q, k, v, out, lse, ids, False, kv_segment_ids=kv_ids)
    starts = [*whole.diff(prepend=torch.tensor([-1])).nonzero().flatten().tolist(), keys]
    inside = [(a, b) for a, b in itertools.pairwise(starts) if first <= a and b <= first + queries]
    for begin, end in (inside[0], inside[len(inside) // 2], inside[-1]):
        mine, theirs = slice(begin - first, end - first), slice(begin, end)
        exact = dense_attention(q[:, mine], k[:, theirs], v[:, theirs], causal=False, grad_out=grad[:, mine])
        for name, found in {"out": out[:, mine], "dq": dq[:, mine], "dk": dk[:, theirs], "dv": dv[:, theirs]}.items():
            assert norm_error(found, exact[name]) < 2e-2, (name, begin, end)
    unseen = torch.ones(keys, dtype=torch.bool)
    unseen[(whole >= whole[first]) & (whole <= whole[first + queries - 1])] = False
    assert (dk[:, unseen] == 0).all() and (dv[:, unseen] == 0).all()
