"""The CUDA flash backward: gradients of every kind of problem against float64, zeros, repeatability, graph capture."""

import math
import random
from dataclasses import replace

import pytest
import torch
from support.problems import Problem, allowed_pairs, long, make_ids, strided
from torch import Tensor

pytestmark = pytest.mark.gpu


def backward_op():
    """The operator, from the package or from a library that is loaded already."""
    if not hasattr(torch.ops.selfattn, "flash_attention_backward"):
        import selfattn  # noqa: F401
    return torch.ops.selfattn.flash_attention_backward


def attention_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    allowed: Tensor,
    scale: float,
    rounding: torch.dtype,
    saved: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """(out, lse) and (dq, dk, dv) by the formula, in q's precision, with P and dS rounded to ``rounding``."""
    group = q.shape[2] // k.shape[2]
    q, grad_out = (tensor.transpose(1, 2) for tensor in (q, grad_out))
    k, v = (tensor.transpose(1, 2).repeat_interleave(group, 1) for tensor in (k, v))

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(rounding).to(tensor.dtype)

    logits = (scale * (q @ k.transpose(-1, -2))).masked_fill(~allowed, -math.inf)
    lse = logits.logsumexp(-1) if saved is None else saved[1].to(q.dtype)
    p = (logits - lse[..., None]).exp().masked_fill(~allowed, 0.0)
    out = p @ v if saved is None else saved[0].transpose(1, 2).to(q.dtype)
    delta = (grad_out * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None].to(q.dtype)
    ds = rounded((p * (grad_out @ v.transpose(-1, -2) - delta)).masked_fill(~allowed, 0.0))
    dq = scale * (ds @ k)
    dk = scale * (ds.transpose(-1, -2) @ q)
    dv = rounded(p).transpose(-1, -2) @ grad_out
    dk, dv = (tensor.unflatten(1, (-1, group)).sum(2) for tensor in (dk, dv))
    return (out.transpose(1, 2), lse), tuple(rounded(tensor).transpose(1, 2) for tensor in (dq, dk, dv))


def poison_free_memory() -> None:
    """What the allocator hands out next holds NaN."""
    tensors = [
        torch.full((size // 4,), float("nan"), device="cuda") for size in (1 << 28, *[1 << 23] * 8, *[1 << 19] * 16)
    ]
    torch.cuda.synchronize()
    del tensors


def make_inputs(problem: Problem) -> dict:
    value_dim = problem.value_dim or problem.dim

    def random_rows(length: int, heads: int, dim: int, spread: float = 1.0) -> Tensor:
        values = torch.randn(problem.batch, length, heads, dim, device="cuda") * spread
        return strided(values.to(problem.dtype), problem.layout)

    ids, key_ids = (
        (None, None)
        if problem.ids is None
        else make_ids(problem.ids, problem.batch, problem.num_queries, problem.num_keys)
    )
    ids = None if ids is None else ids.to("cuda", torch.int32)
    key_ids = None if key_ids is None else key_ids.to("cuda", torch.int32)
    q = random_rows(problem.num_queries, problem.num_heads, problem.dim, 1.5)
    k = random_rows(problem.num_keys, problem.num_kv_heads, problem.dim, 1.5)
    v = random_rows(problem.num_keys, problem.num_kv_heads, value_dim)
    grad_out = random_rows(problem.num_queries, problem.num_heads, value_dim)
    allowed = allowed_pairs(problem, ids, key_ids)
    scale = problem.dim**-0.5 if problem.scale is None else problem.scale
    grad_lse = (
        torch.randn(problem.batch, problem.num_heads, problem.num_queries, device="cuda")
        if problem.has_grad_lse
        else None
    )
    wide = [tensor.double() for tensor in (q, k, v, grad_out)]
    (out, lse), expected = attention_gradients(*wide, grad_lse, allowed, scale, torch.float64)
    out, lse = strided(out.to(problem.dtype), problem.layout), lse.float()
    narrow = [tensor.float() for tensor in (q, k, v, grad_out)]
    _, same_precision = attention_gradients(*narrow, grad_lse, allowed, scale, problem.dtype, (out, lse))
    call = (grad_out, grad_lse, q, k, v, out, lse, ids, problem.causal, problem.scale)
    return {
        "call": call,
        "options": {**problem.options, "kv_segment_ids": key_ids},
        "expected": expected,
        "same_precision": same_precision,
        "allowed": allowed,
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def assert_as_good(name: str, actual: Tensor, expected: Tensor, same_precision: Tensor) -> None:
    """The error is that of the formula in the same precision; the floor counts where the true gradient is zero."""
    error, allowance = (
        (tensor.double() - expected).square().mean().sqrt().item() for tensor in (actual, same_precision)
    )
    assert error <= 1.5 * allowance + 1e-5, f"{name}: error {error:.2e}, same-precision formula {allowance:.2e}"


def check(problem: Problem) -> None:
    inputs = make_inputs(problem)
    poison_free_memory()
    actual = backward_op()(*inputs["call"], **inputs["options"])
    sees, is_seen = inputs["allowed"].any(-1)[:, 0], inputs["allowed"].any(-2)[:, 0]
    for name, mine, exact, reference, used in zip(
        ("dq", "dk", "dv"), actual, inputs["expected"], inputs["same_precision"], (sees, is_seen, is_seen), strict=True
    ):
        assert mine.shape == exact.shape
        assert mine.isfinite().all(), f"{name} of {problem}: {(~mine.isfinite()).sum().item()} elements are not finite"
        assert (mine[~used] == 0).all(), f"{name} of {problem}: rows without a pair are not zero"
        assert_as_good(f"{name} of {problem}", mine, exact, reference)


# Queries that see few keys are worked on by another form of the kernels than those that see many: these see few.
HAND_MADE = [
    Problem(num_kv_heads=4),
    Problem(causal=False, num_kv_heads=4),
    *(Problem(num_queries=n, num_keys=n) for n in (1, 63, 64, 65, 127, 128, 129, 257, 640)),
    *(Problem(num_queries=n, num_keys=n, dim=64, causal=False) for n in (1, 64, 129, 513)),
    *(Problem(dim=dim, dtype=dtype) for dim in (64, 256) for dtype in (torch.bfloat16, torch.float16)),
    Problem(dtype=torch.float16),
    *(Problem(dim=dim) for dim in (8, 16, 40, 72, 96, 120, 136, 192, 248)),
    Problem(dim=192, value_dim=128),
    Problem(dim=64, value_dim=128),
    *(
        Problem(ids=kind, dim=dim, causal=causal)
        for kind in (
            "packed",
            "packed_padded",
            "short",
            "one_row_general",
            "random",
            "blocks",
            "distinct",
            "all_padding",
        )
        for dim in (64, 128, 256)
        for causal in (True, False)
    ),
    *(
        Problem(ids=kind, num_queries=nq, num_keys=nk, causal=causal)
        for kind in ("separate", "separate_documents")
        for nq, nk in ((200, 333), (333, 200))
        for causal in (True, False)
    ),
    *(
        Problem(num_queries=nq, num_keys=nk, causal=causal, dim=dim)
        for nq, nk in ((100, 400), (400, 100), (1, 500), (500, 1))
        for causal in (True, False)
        for dim in (64, 128, 256)
    ),
    *(
        Problem(window_left=left, window_right=right, causal=causal, num_queries=nq, num_keys=500)
        for left, right, causal in ((30, -1, True), (0, 0, False), (100, 70, False), (-1, 20, False), (3, -1, False))
        for nq in (500, 300)
    ),
    Problem(window_left=40, ids="packed"),
    Problem(window_left=40, window_right=9, causal=False, ids="blocks"),
    *(Problem(num_heads=8, num_kv_heads=heads, dim=dim) for heads in (1, 2, 8) for dim in (64, 128, 256)),
    *(Problem(has_grad_lse=True, ids=ids) for ids in (None, "packed_padded", "random")),
    *(Problem(layout=layout, dim=dim) for layout in ("bnsd", "padded") for dim in (64, 128, 256)),
    *(Problem(scale=scale) for scale in (0.01, 1.0)),
    *(
        Problem(batch=48, num_queries=640, num_keys=640, num_heads=8, num_kv_heads=4, dim=dim, ids=ids)
        for dim in (64, 128, 256)
        for ids in (None, "packed", "random")
    ),
    *(
        Problem(
            batch=20,
            num_queries=1024,
            num_keys=1024,
            num_heads=4,
            num_kv_heads=kv_heads,
            dim=dim,
            ids=ids,
            causal=False,
        )
        for kv_heads in (2, 4)
        for dim in (64, 128)
        for ids in (None, "packed", "random")
    ),
]


def several_launches(**fields) -> Problem:
    """Where only the device knows the form, for more batches than one launch of the fused form takes: 6 and 2."""
    return replace(long(1500, batch=8, num_heads=16, num_kv_heads=16, causal=False), **fields)


# The last groups are long enough for side jobs, too.
LONG = [
    *(long(n, dim=dim, causal=causal) for n in (2600, 2689) for dim in (64, 128) for causal in (True, False)),
    *(
        long(ids=kind, dim=dim, causal=causal)
        for kind in ("long_documents", "packed", "random", "blocks", "distinct", "one_row_general")
        for dim in (64, 128)
        for causal in (True, False)
    ),
    *(long(ids="long_documents", batch=3, dim=dim, num_kv_heads=heads) for dim in (64, 128) for heads in (1, 4)),
    *(long(nq, nk, dim=dim) for nq, nk in ((1500, 2900), (2900, 1500)) for dim in (64, 128)),
    *(long(nq, nk, ids="separate") for nq, nk in ((1500, 2900), (2900, 1500))),
    *(
        long(window_left=left, window_right=right, causal=False)
        for left, right in ((1900, 20), (-1, 300), (1400, 1400))
    ),
    long(window_left=1700, ids="long_documents"),
    *(long(num_heads=8, num_kv_heads=heads, dim=dim) for heads in (1, 2, 8) for dim in (64, 128)),
    *(long(has_grad_lse=True, ids=ids) for ids in (None, "long_documents", "random")),
    *(long(layout=layout, dtype=torch.float16) for layout in ("bnsd", "padded")),
    *(long(dim=dim) for dim in (40, 72, 96)),
    *(
        long(1500, batch=6, num_heads=heads, num_kv_heads=4, dim=dim, causal=False, ids=ids)
        for heads in (4, 8)
        for dim in (64, 128)
        for ids in (None, "long_documents", "random")
    ),
    # More tiles than thread blocks: those of grouped heads change their direction.
    *(long(1500, batch=8, num_heads=8, num_kv_heads=2, dim=dim) for dim in (64, 128, 256)),
    *(several_launches(dim=dim, ids="mostly_long_documents") for dim in (64, 128)),
    several_launches(ids="mostly_short_documents", has_grad_lse=True, layout="bnsd"),
]


def random_problem(seed: int) -> Problem:
    r = random.Random(seed)
    kv_heads = r.choice((1, 2, 3))
    dim = 8 * r.randint(1, 32)
    ids = r.choice((None, "packed", "packed_padded", "short", "one_row_general", "random", "blocks", "separate"))
    num_queries = r.randint(1, 700)
    num_keys = num_queries if ids not in (None, "separate") else r.randint(1, 700)
    return Problem(
        batch=r.randint(1, 3),
        num_queries=num_queries,
        num_keys=num_keys,
        num_heads=kv_heads * r.choice((1, 2, 4)),
        num_kv_heads=kv_heads,
        dim=dim,
        value_dim=r.choice((0, 8 * r.randint(1, 32))),
        dtype=r.choice((torch.bfloat16, torch.float16)),
        ids=ids,
        causal=r.random() < 0.6,
        window_left=r.choice((-1, -1, r.randint(0, 300))),
        window_right=r.choice((-1, -1, r.randint(0, 300))),
        has_grad_lse=r.random() < 0.3,
        layout=r.choice(("bsnd", "bnsd", "padded")),
    )


@pytest.mark.parametrize("problem", [*HAND_MADE, *LONG], ids=str)
def test_backward_matches_float64(problem: Problem) -> None:
    check(problem)


@pytest.mark.parametrize("seed", range(80))
def test_backward_matches_float64_on_random_problems(seed: int) -> None:
    check(random_problem(seed))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


DETERMINISTIC = [
    Problem(num_queries=1500, num_keys=1500, dim=dim, causal=causal, ids=ids, num_heads=8)
    for dim in (64, 128, 256)
    for causal in (True, False)
    for ids in (None, "packed", "packed_padded", "blocks")
] + [
    Problem(num_queries=900, num_keys=1500, window_left=300),
    Problem(num_queries=1500, num_keys=900, causal=False),
    Problem(num_queries=700, num_keys=900, ids="separate"),
    *(
        Problem(batch=48, num_queries=640, num_keys=640, num_heads=8, num_kv_heads=4, dim=dim, ids="packed")
        for dim in (64, 128, 256)
    ),
]


@pytest.mark.parametrize("problem", DETERMINISTIC, ids=str)
def test_deterministic_backward_repeats_bitwise(problem: Problem, deterministic: None) -> None:
    inputs = make_inputs(problem)
    first = backward_op()(*inputs["call"], **inputs["options"])
    for name, mine, exact, reference in zip(
        ("dq", "dk", "dv"), first, inputs["expected"], inputs["same_precision"], strict=True
    ):
        assert_as_good(name, mine, exact, reference)
    for _ in range(3):
        again = backward_op()(*inputs["call"], **inputs["options"])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dim", (64, 128, 256))
def test_fast_backward_repeats_key_gradients_bitwise(dim: int) -> None:
    inputs = make_inputs(Problem(num_queries=2000, num_keys=2000, num_heads=16, num_kv_heads=4, dim=dim))
    first = backward_op()(*inputs["call"], **inputs["options"])
    for _ in range(5):
        again = backward_op()(*inputs["call"], **inputs["options"])
        assert all(torch.equal(a, b) for a, b in zip(first[1:], again[1:], strict=True))
        assert relative_error(again[0], first[0]) < 5e-3


@pytest.mark.parametrize("ids", (None, "packed", "random"))
def test_backward_is_captured_by_a_graph_and_reads_new_values(ids: str | None) -> None:
    problem = Problem(ids=ids)
    captured, fresh = make_inputs(problem), make_inputs(problem)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        backward_op()(*captured["call"], **captured["options"])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        gradients = backward_op()(*captured["call"], **captured["options"])
    for mine, new in zip(captured["call"], fresh["call"], strict=True):
        if isinstance(mine, Tensor):
            mine.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    for name, mine, exact, reference in zip(
        ("dq", "dk", "dv"), gradients, fresh["expected"], fresh["same_precision"], strict=True
    ):
        assert_as_good(name, mine, exact, reference)


@pytest.mark.parametrize("dim", (64, 128, 256))
def test_backward_bears_extreme_logsumexp(dim: int) -> None:
    inputs = make_inputs(Problem(dim=dim, ids="packed_padded"))
    grad_out, grad_lse, q, k, v, out, lse, *rest = inputs["call"]
    lse = lse.clone()
    lse[:, :, ::3] = -3.4e38
    lse[:, :, 1::3] = -math.inf
    dq, dk, dv = backward_op()(
        grad_out, grad_lse, q * 0, k, v, out, torch.where(lse > -1e38, lse, -math.inf), *rest, **inputs["options"]
    )
    assert all(gradient.isfinite().all() for gradient in (dq, dk, dv))
    assert (dq[:, 1::3] == 0).all()


def test_backward_takes_expanded_gradients() -> None:
    inputs = make_inputs(replace(Problem(), num_queries=128, num_keys=128))
    grad_out = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, device="cuda").expand_as(inputs["call"][0])
    expanded = backward_op()(grad_out, *inputs["call"][1:], **inputs["options"])
    copied = backward_op()(grad_out.contiguous(), *inputs["call"][1:], **inputs["options"])
    assert torch.equal(expanded[1], copied[1])


def test_backward_names_what_it_cannot_do() -> None:
    inputs = make_inputs(Problem(num_queries=64, num_keys=64))
    with pytest.raises(NotImplementedError, match="softcap"):
        backward_op()(*inputs["call"], **inputs["options"], softcap=2.0)
    with pytest.raises(ValueError, match="grad_out"):
        backward_op()(inputs["call"][0][:, 1:], *inputs["call"][1:], **inputs["options"])
    with pytest.raises(NotImplementedError, match="multiples of 8"):
        odd = [
            tensor[..., :60] if isinstance(tensor, Tensor) and tensor.dim() == 4 else tensor
            for tensor in inputs["call"]
        ]
        backward_op()(*odd, **inputs["options"])
