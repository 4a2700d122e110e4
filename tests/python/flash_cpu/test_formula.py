"""The CPU flash kernels against the dense formula in float64: every option, sizes around the tiles, any threads."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import selfattn  # noqa: F401  (registers the operators)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative error in the norm that rounding alone explains, where the same-precision formula happens to be exact.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Largest absolute error of one element, relative to the largest element or 1: also holds where the result is zero.
ABSOLUTE = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}


@dataclass(frozen=True)
class Problem:
    """One call of flash_attention and its backward."""

    name: str = ""
    batch: int = 2
    num_queries: int = 150
    num_keys: int = 150
    num_heads: int = 2
    num_kv_heads: int = 2
    dim: int = 64
    value_dim: int = 64
    ids: str | None = None
    has_kv_ids: bool = False
    has_sinks: bool = False
    has_grad_lse: bool = False
    layout: str = "bsnd"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def with_(self, **changes) -> "Problem":
        return replace(self, **changes)


def make_ids(kind: str, batch: int, length: int) -> Tensor:
    positions = torch.arange(length)
    if kind == "packed":
        ids = (torch.rand(batch, length) < 1 / 40).cumsum(1)
        ids[:, length - length // 6 :] = -1
    elif kind == "shuffled":
        ids = torch.randint(0, 3, (batch, length))
    elif kind == "reused":  # whole blocks of an id that comes back, so that some blocks are skipped and some are full
        ids = (positions // 64 % 3).expand(batch, length)
    elif kind == "distinct":
        ids = positions.expand(batch, length)
    elif kind == "descending":
        ids = (length - positions).expand(batch, length) // 20
    elif kind == "padding":
        ids = torch.full((batch, length), -1)
    elif kind == "mixed_padding":
        ids = torch.randint(-3, 3, (batch, length))
    else:
        raise ValueError(kind)
    return ids.contiguous()


def make_tensor(batch: int, length: int, heads: int, dim: int, dtype: torch.dtype, layout: str = "bsnd") -> Tensor:
    """(B, S, N, D), laid out as named and surrounded by NaN, which nobody may read."""
    if layout == "bnsd":
        room = torch.full((batch, heads, length + 2, dim + 3), math.nan, dtype=dtype).transpose(1, 2)
    elif layout == "bsdn":  # the last dimension is not contiguous
        room = torch.full((batch, length + 2, dim + 3, heads), math.nan, dtype=dtype).transpose(2, 3)
    else:
        room = torch.full((batch, length + 2, heads, dim + 3), math.nan, dtype=dtype)
    tensor = room[:, 1 : length + 1, :, 1 : dim + 1]
    return tensor.copy_(torch.randn(batch, length, heads, dim))


def allowed_pairs(problem: Problem, ids: Tensor | None, kv_ids: Tensor | None) -> Tensor:
    """(B, 1, Sq, Skv)."""
    shift = problem.num_keys - problem.num_queries
    i = torch.arange(problem.num_queries)[:, None] + shift
    j = torch.arange(problem.num_keys)[None]
    allowed = torch.ones(problem.batch, problem.num_queries, problem.num_keys, dtype=torch.bool)
    if problem.options.get("causal", True):
        allowed &= j <= i
    if (left := problem.options.get("window_left", -1)) >= 0:
        allowed &= j >= i - left
    if (right := problem.options.get("window_right", -1)) >= 0:
        allowed &= j <= i + right
    if ids is not None:
        allowed &= (ids[:, :, None] == kv_ids[:, None, :]) & (ids[:, :, None] >= 0)
    return allowed[:, None]


def dense(problem: Problem, tensors: dict[str, Tensor], allowed: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv of the formula, with its products in ``dtype``."""
    q, k, v = (tensors[name].to(dtype).detach().requires_grad_() for name in "qkv")
    group = problem.num_heads // problem.num_kv_heads
    heads_first = [t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))]
    scale = problem.options.get("qk_scale", problem.dim**-0.5)
    softmax_dtype = torch.promote_types(dtype, torch.float32)
    logits = (heads_first[0] @ heads_first[1].transpose(2, 3)).to(softmax_dtype) * scale
    if (cap := problem.options.get("softcap", 0.0)) > 0:
        logits = cap * torch.tanh(logits / cap)
    logits = logits.masked_fill(~allowed, -math.inf)
    if "sinks" in tensors:
        sinks = tensors["sinks"].to(softmax_dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0)[..., None])[..., : problem.num_keys]
    out = (weights.to(dtype) @ heads_first[2]).transpose(1, 2)
    loss = (out * tensors["grad_out"].to(dtype)).sum()
    if "grad_lse" in tensors:
        loss = loss + (lse.masked_fill(lse == -math.inf, 0) * tensors["grad_lse"].to(softmax_dtype)).sum()
    return (out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v)))


def make_tensors(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    batch, layout = problem.batch, problem.layout
    tensors = {
        "q": make_tensor(batch, problem.num_queries, problem.num_heads, problem.dim, dtype, layout),
        "k": make_tensor(batch, problem.num_keys, problem.num_kv_heads, problem.dim, dtype, layout),
        "v": make_tensor(batch, problem.num_keys, problem.num_kv_heads, problem.value_dim, dtype, layout),
        "grad_out": make_tensor(batch, problem.num_queries, problem.num_heads, problem.value_dim, dtype, layout),
    }
    if problem.has_sinks:
        tensors["sinks"] = torch.randn(problem.num_heads)
    if problem.has_grad_lse:
        tensors["grad_lse"] = torch.randn(batch, problem.num_heads, problem.num_queries)
    return tensors


def run_kernels(problem: Problem, tensors: dict[str, Tensor], ids: Tensor | None, kv_ids: Tensor | None):
    """out, lse, dq, dk, dv of the operators."""
    pairs = {"segment_ids": ids, "kv_segment_ids": kv_ids, **problem.options}
    qkv = [tensors[name] for name in "qkv"]
    with torch.no_grad():
        out, lse = torch.ops.selfattn.flash_attention(*qkv, **pairs, sinks=tensors.get("sinks"))
        grads = torch.ops.selfattn.flash_attention_backward(
            tensors["grad_out"], tensors.get("grad_lse"), *qkv, out, lse, **pairs
        )
    return (out, lse, *grads)


def norm_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite])
    assert actual[finite].isfinite().all()
    return ((actual[finite] - expected[finite]).norm() / expected[finite].norm().clamp_min(1e-3)).item()


def check(problem: Problem, dtype: torch.dtype, is_strict: bool) -> None:
    tensors = make_tensors(problem, dtype)
    ids = kv_ids = None
    if problem.ids:
        ids = make_ids(problem.ids, problem.batch, problem.num_queries).to(torch.int32)
        kv_ids = make_ids(problem.ids, problem.batch, problem.num_keys).to(torch.int64) if problem.has_kv_ids else ids
    allowed = allowed_pairs(problem, ids, kv_ids)
    results = run_kernels(problem, tensors, ids, kv_ids if problem.has_kv_ids else None)
    expected = dense(problem, tensors, allowed, torch.float64)
    peers = dense(problem, tensors, allowed, dtype)
    dead_rows = ~allowed.any(-1)[:, 0]
    assert (results[0][dead_rows] == 0).all() and (results[2][dead_rows] == 0).all()
    for name, actual, exact, peer in zip(("out", "lse", "dq", "dk", "dv"), results, expected, peers, strict=True):
        assert actual.dtype == (torch.float32 if name == "lse" else dtype)
        if is_strict:
            bound = max(2 * norm_error(peer, exact), FLOOR[torch.float32 if name == "lse" else dtype])
            assert norm_error(actual, exact) <= bound, name
        else:
            norm_error(actual, exact)  # infinities and NaN
            largest = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
            finite = exact.isfinite()
            deviation = (actual.double() - exact)[finite].abs().max().item() if finite.any() else 0.0
            assert deviation <= ABSOLUTE[dtype] * max(largest, 1.0), name


FULL = {"causal": False}
PROBLEMS = [
    Problem("causal"),
    Problem("full", options=FULL),
    Problem("many_tiles", batch=1, num_queries=700, num_keys=700, num_heads=1, num_kv_heads=1),
    Problem("fewer_queries", num_queries=70, num_keys=333),
    Problem("more_queries", num_queries=333, num_keys=70),
    Problem("grouped", num_heads=12, num_kv_heads=3, num_queries=100, num_keys=100),
    Problem("grouped_by_five", num_heads=5, num_kv_heads=1, num_queries=77, num_keys=130, options=FULL),
    Problem("dim_512", batch=1, dim=512, value_dim=512, num_queries=80, num_keys=80),
    Problem("odd_dims", dim=67, value_dim=35),
    Problem("dims_differ", dim=40, value_dim=136),
    Problem("window", num_queries=400, num_keys=400, batch=1, options={"window_left": 90}),
    Problem("window_both", options={"window_left": 30, "window_right": 11, "causal": False}),
    Problem("softcap", options={"softcap": 2.0}),
    Problem("sinks", has_sinks=True, has_grad_lse=True),
    Problem("scale_negative", options={"qk_scale": -0.3}),
    Problem("grad_lse", has_grad_lse=True, options=FULL),
    Problem("packed", ids="packed", num_queries=400, num_keys=400),
    Problem("packed_full", ids="packed", num_queries=300, num_keys=300, options=FULL),
    Problem("packed_grouped", ids="packed", num_heads=8, num_kv_heads=2, num_queries=210, num_keys=210),
    Problem("shuffled", ids="shuffled"),
    Problem("reused", ids="reused", num_queries=450, num_keys=450, batch=1),
    Problem("descending", ids="descending", options=FULL),
    Problem("mixed_padding", ids="mixed_padding", options=FULL),
    Problem("own_ids_for_keys", ids="shuffled", has_kv_ids=True, num_queries=90, num_keys=260, options=FULL),
    Problem("packed_ids_for_keys", ids="packed", has_kv_ids=True, num_queries=260, num_keys=90, options=FULL),
    Problem("heads_first", layout="bnsd"),
    Problem("heads_last", layout="bsdn"),
    Problem("one_query", num_queries=1, num_keys=3000, batch=1, num_heads=4),
    Problem("few_queries_grouped", num_queries=5, num_keys=2100, num_heads=16, num_kv_heads=2, batch=1),
    Problem(
        "everything",
        num_heads=6,
        dim=48,
        value_dim=72,
        ids="shuffled",
        has_kv_ids=True,
        has_sinks=True,
        has_grad_lse=True,
        num_queries=100,
        num_keys=170,
        options={"causal": False, "window_left": 70, "window_right": 60, "softcap": 3.0, "qk_scale": 0.4},
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_error_is_at_most_twice_that_of_the_formula(problem: Problem, dtype: torch.dtype) -> None:
    check(problem, dtype, is_strict=True)


LENGTHS = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 200, 257])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    num_queries = draw(LENGTHS)
    ids = draw(
        st.sampled_from([None, "packed", "shuffled", "reused", "distinct", "descending", "padding", "mixed_padding"])
    )
    num_keys = num_queries if draw(st.booleans()) else draw(LENGTHS)
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    return Problem(
        batch=draw(st.integers(1, 2)),
        num_queries=num_queries,
        num_keys=num_keys,
        num_heads=num_kv_heads * draw(st.sampled_from([1, 2, 5])),
        num_kv_heads=num_kv_heads,
        dim=draw(st.sampled_from([1, 2, 15, 16, 33, 64, 80])),
        value_dim=draw(st.sampled_from([1, 8, 17, 64, 70])),
        ids=ids,
        has_kv_ids=ids is not None and (num_keys != num_queries or draw(st.booleans())),
        has_sinks=draw(st.booleans()),
        has_grad_lse=draw(st.booleans()),
        layout=draw(st.sampled_from(["bsnd", "bnsd", "bsdn"])),
        options={
            "causal": draw(st.booleans()),
            "window_left": draw(st.sampled_from([-1, -1, 0, 3, 70])),
            "window_right": draw(st.sampled_from([-1, -1, 0, 5, 66])),
            "softcap": draw(st.sampled_from([0.0, 0.0, 1.5])),
            "qk_scale": draw(st.sampled_from([0.3, -0.2, 0.0])),
        },
    )


@given(problem=problems(), dtype=st.sampled_from(DTYPES))
def test_any_problem_equals_the_formula(problem: Problem, dtype: torch.dtype) -> None:
    check(problem, dtype, is_strict=False)


@pytest.fixture
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 7], indirect=True)
@pytest.mark.parametrize("num_heads", [1, 3])
def test_any_number_of_threads_gives_the_result(threads: int, num_heads: int) -> None:
    check(Problem(num_queries=520, num_keys=520, num_heads=num_heads, num_kv_heads=num_heads), torch.bfloat16, True)
    check(Problem(num_queries=2, num_keys=2600, num_heads=num_heads, num_kv_heads=num_heads), torch.bfloat16, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("num_heads", [1, 4])
def test_results_repeat_bitwise(num_heads: int, dtype: torch.dtype) -> None:
    problem = Problem(num_queries=600, num_keys=600, num_heads=num_heads, num_kv_heads=num_heads, ids="packed")
    tensors = make_tensors(problem, dtype)
    ids = make_ids("packed", problem.batch, problem.num_queries)
    first = run_kernels(problem, tensors, ids, None)
    for _ in range(4):
        again = run_kernels(problem, tensors, ids, None)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_nan_of_the_inputs_is_not_hidden() -> None:
    problem = Problem(batch=1, num_queries=20, num_keys=20)
    tensors = make_tensors(problem, torch.float32)
    tensors["q"][0, 7] = math.nan
    out = run_kernels(problem, tensors, None, None)[0]
    assert out[0, 7].isnan().all()
    assert out[0, :7].isfinite().all() and out[0, 8:].isfinite().all()
