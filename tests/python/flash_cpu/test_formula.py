"""The CPU flash kernels against the dense formula in float64: every option, sizes around the tiles, any threads."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.problems import Case, dense_attention, norm_error
from torch import Tensor

import selfattn  # noqa: F401  (registers the operators)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative error in the norm that rounding alone explains, where the same-precision formula happens to be exact.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Largest absolute error of one element, relative to the largest element or 1: also holds where the result is zero.
ABSOLUTE = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}


@dataclass(frozen=True)
class Problem(Case):
    """Surrounded by NaN, which nobody may read."""

    num_queries: int = 150
    num_heads: int = 2
    dim: int = 64
    ids: str | None = None
    layout: str = "surrounded"


def run_kernels(problem: Problem, tensors: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of the operators."""
    call = {**tensors, **problem.options}
    with torch.no_grad():
        out, lse = torch.ops.selfattn.flash_attention(**call)
        call.pop("sinks", None)
        gradients = torch.ops.selfattn.flash_attention_backward(
            grads["grad_out"], grads.get("grad_lse"), out=out, lse=lse, **call
        )
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def check(problem: Problem, dtype: torch.dtype, is_strict: bool) -> None:
    tensors, grads = problem.tensors(dtype), problem.grads(dtype)
    if problem.has_kv_ids:  # the two may be of two types
        tensors["kv_segment_ids"] = tensors["kv_segment_ids"].long()
    if problem.has_sinks:
        tensors["sinks"] = tensors["sinks"].float()
    results = run_kernels(problem, tensors, grads)
    call = {**tensors, **grads, **problem.options}
    expected = dense_attention(**call)
    peers = dense_attention(**call, precision=torch.float32, rounding=dtype)
    dead_rows = ~problem.allowed(tensors).any(-1)[:, 0]
    assert (results["out"][dead_rows] == 0).all() and (results["dq"][dead_rows] == 0).all()
    for name, exact in expected.items():
        actual, kind = results[name], torch.float32 if name == "lse" else dtype
        assert actual.dtype == kind
        deviation = norm_error(actual, exact, smallest=1e-3)
        if is_strict:
            assert deviation <= max(2 * norm_error(peers[name], exact, smallest=1e-3), FLOOR[kind]), name
        else:
            finite = exact[exact.isfinite()]
            largest = finite.abs().max().item() if finite.numel() else 0.0
            deviation = (actual.double() - exact)[exact.isfinite()].abs().max().item() if finite.numel() else 0.0
            assert deviation <= ABSOLUTE[dtype] * max(largest, 1.0), name


PROBLEMS = [
    Problem("causal"),
    Problem("full", causal=False),
    Problem("many_tiles", batch=1, num_queries=700, num_heads=1, num_kv_heads=1),
    Problem("fewer_queries", num_queries=70, num_keys=333),
    Problem("more_queries", num_queries=333, num_keys=70),
    Problem("grouped", num_heads=12, num_kv_heads=3, num_queries=100),
    Problem("grouped_by_five", num_heads=5, num_kv_heads=1, num_queries=77, num_keys=130, causal=False),
    Problem("dim_512", batch=1, dim=512, num_queries=80),
    Problem("odd_dims", dim=67, value_dim=35),
    Problem("dims_differ", dim=40, value_dim=136),
    Problem("window", num_queries=400, batch=1, window_left=90),
    Problem("window_both", window_left=30, window_right=11, causal=False),
    Problem("softcap", softcap=2.0),
    Problem("sinks", has_sinks=True, has_grad_lse=True),
    Problem("scale_negative", qk_scale=-0.3),
    Problem("grad_lse", has_grad_lse=True, causal=False),
    Problem("packed", ids="padding_after", num_queries=400),
    Problem("packed_full", ids="padding_after", num_queries=300, causal=False),
    Problem("packed_grouped", ids="padding_after", num_heads=8, num_kv_heads=2, num_queries=210),
    Problem("shuffled", ids="shuffled"),
    Problem("reused", ids="reused_tiles", num_queries=450, batch=1),
    Problem("descending", ids="descending", causal=False),
    Problem("named", ids="named"),
    Problem("named_padding", ids="named_padding", causal=False),
    Problem("own_named_ids_for_keys", ids="named", num_keys=300, has_kv_ids=True, causal=False),
    Problem("mixed_padding", ids="mixed_padding", causal=False),
    Problem("own_ids_for_keys", ids="shuffled", has_kv_ids=True, num_queries=90, num_keys=260, causal=False),
    Problem("packed_ids_for_keys", ids="padding_after", has_kv_ids=True, num_queries=260, num_keys=90, causal=False),
    Problem("positions_index", positions="index", num_queries=200, num_keys=333),
    Problem("positions_zigzag", positions="zigzag", num_queries=450, batch=1),
    Problem("positions_gathered", positions="gathered", num_queries=150, num_keys=600, batch=1),
    Problem("positions_zigzag_window", positions="zigzag", num_queries=450, batch=1, window_left=90),
    Problem("positions_restarting", positions="restarting", ids="padding_after", num_queries=300),
    Problem("positions_of_reused", positions="restarting", ids="reused_tiles", num_queries=450, batch=1),
    Problem("positions_in_order_of_shuffled", positions="index", ids="shuffled", num_queries=300),
    Problem("positions_permuted", positions="permuted", ids="shuffled_padding", num_queries=300),
    Problem("positions_cache", positions="cache", num_queries=3, num_keys=2100, num_heads=8),
    Problem("positions_future", positions="future", num_queries=200),
    Problem("positions_extreme", positions="extreme", window_left=1, window_right=3, causal=False),
    Problem("heads_first", layout="surrounded_bnsd"),
    Problem("heads_last", layout="surrounded_bsdn"),
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
        causal=False,
        window_left=70,
        window_right=60,
        softcap=3.0,
        qk_scale=0.4,
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_error_is_at_most_twice_that_of_the_formula(problem: Problem, dtype: torch.dtype) -> None:
    check(problem, dtype, is_strict=True)


IDS = (
    "padding_after",
    "shuffled",
    "reused_tiles",
    "distinct",
    "descending",
    "named_padding",
    "all_padding",
    "mixed_padding",
)
POSITIONS = ("index", "zigzag", "restarting", "any", "permuted", "extreme_in_order", "future")
LENGTHS = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 200, 257])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    num_queries = draw(LENGTHS)
    ids = draw(st.sampled_from([None, *IDS]))
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
        positions=draw(st.sampled_from([None, None, *POSITIONS])),
        has_sinks=draw(st.booleans()),
        has_grad_lse=draw(st.booleans()),
        layout=draw(st.sampled_from(["surrounded", "surrounded_bnsd", "surrounded_bsdn"])),
        causal=draw(st.booleans()),
        window_left=draw(st.sampled_from([-1, -1, 0, 3, 70])),
        window_right=draw(st.sampled_from([-1, -1, 0, 5, 66])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5])),
        qk_scale=draw(st.sampled_from([0.3, -0.2, 0.0])),
    )


@given(problem=problems(), dtype=st.sampled_from(DTYPES))
def test_any_problem_equals_the_formula(problem: Problem, dtype: torch.dtype) -> None:
    check(problem, dtype, is_strict=False)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_any_number_of_threads_gives_the_result(threads: int, num_heads: int) -> None:
    torch.set_num_threads(threads)
    check(Problem(num_queries=520, num_heads=num_heads, num_kv_heads=num_heads), torch.bfloat16, True)
    check(Problem(num_queries=2, num_keys=2600, num_heads=num_heads, num_kv_heads=num_heads), torch.bfloat16, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("num_heads", [1, 4])
def test_results_repeat_bitwise(num_heads: int, dtype: torch.dtype) -> None:
    problem = Problem(num_queries=600, num_heads=num_heads, num_kv_heads=num_heads, ids="padding_after")
    tensors, grads = problem.tensors(dtype), problem.grads(dtype)
    tensors["segment_ids"] = tensors["segment_ids"].long()
    first = run_kernels(problem, tensors, grads)
    for _ in range(4):
        again = run_kernels(problem, tensors, grads)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_nan_of_the_inputs_is_not_hidden() -> None:
    problem = Problem(batch=1, num_queries=20)
    tensors = problem.tensors()
    tensors["q"][0, 7] = math.nan
    out = run_kernels(problem, tensors, problem.grads())["out"]
    assert out[0, 7].isnan().all()
    assert out[0, :7].isfinite().all() and out[0, 8:].isfinite().all()
