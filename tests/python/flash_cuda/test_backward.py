"""The CUDA flash backward: gradients of every kind of problem against float64, zeros, repeatability, graph capture."""

import math
import random

import pytest
import torch
from support.cases import UNALIGNED_DIMS, UNALIGNED_LAYOUTS, UNALIGNED_PAIRS, CudaCase, long
from support.memory import poison_free_memory
from support.problems import dense_attention, lay_out, norm_error
from torch import Tensor

import selfattn  # noqa: F401

pytestmark = pytest.mark.gpu


class Inputs:
    """A call of the backward operator, with out and lse of the exact formula, and what it must give."""

    def __init__(self, problem: CudaCase) -> None:
        tensors, grads = problem.tensors(device="cuda"), problem.grads(device="cuda")
        call = {"grad_lse": None, **tensors, **grads, **problem.options}
        self.exact, self.allowed = dense_attention(**call), problem.allowed(tensors)
        out = lay_out(self.exact.pop("out").to(problem.dtype), problem.layout)
        self.call = {**call, "out": out, "lse": self.exact.pop("lse").float()}
        self.peers = dense_attention(**self.call, precision=torch.float32, rounding=problem.dtype)

    def run(self, **changes: object) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv. Of sinks lse tells."""
        call = {name: value for name, value in {**self.call, **changes}.items() if name != "sinks"}
        return torch.ops.selfattn.flash_attention_backward(**call)

    def assert_as_good(self, gradients: tuple[Tensor, ...]) -> None:
        """The error is that of the formula in the same precision; the floor counts where the true gradient is zero."""
        for (name, exact), mine in zip(self.exact.items(), gradients, strict=True):
            assert mine.shape == exact.shape
            error, allowance = (
                (tensor.double() - exact).square().mean().sqrt().item() for tensor in (mine, self.peers[name])
            )
            assert error <= 1.5 * allowance + 1e-5, f"{name}: error {error:.2e}, same-precision formula {allowance:.2e}"


def check(problem: CudaCase) -> None:
    inputs = Inputs(problem)
    poison_free_memory()
    gradients = inputs.run()
    sees, is_seen = inputs.allowed.any(-1)[:, 0], inputs.allowed.any(-2)[:, 0]
    for name, mine, used in zip(("dq", "dk", "dv"), gradients, (sees, is_seen, is_seen), strict=True):
        assert mine.isfinite().all(), f"{name}: {(~mine.isfinite()).sum().item()} elements are not finite"
        assert (mine[~used] == 0).all(), f"{name}: rows without a pair are not zero"
    inputs.assert_as_good(gradients)


KINDS = (
    "documents",
    "padding_around",
    "short_documents",
    "one_row_reversed",
    "named_padding",
    "shuffled_padding",
    "blocks",
)

CAPS = (0.5, 4.0, 30.0, 1e6)

# Of queries that see few keys; ``long`` ones see many.
HAND_MADE = [
    CudaCase(num_kv_heads=4),
    CudaCase(causal=False, num_kv_heads=4),
    *(CudaCase(num_queries=n) for n in (1, 63, 64, 65, 127, 128, 129, 257, 640)),
    *(CudaCase(num_queries=n, dim=64, causal=False) for n in (1, 64, 129, 513)),
    *(CudaCase(dim=dim, dtype=dtype) for dim in (64, 256) for dtype in (torch.bfloat16, torch.float16)),
    CudaCase(dtype=torch.float16),
    *(CudaCase(dim=dim) for dim in (8, 16, 40, 72, 96, 120, 136, 192, 248)),
    CudaCase(dim=192, value_dim=128),
    CudaCase(dim=64, value_dim=128),
    *(
        CudaCase(ids=kind, dim=dim, causal=causal)
        for kind in (*KINDS, "permuted", "padding_but_one_row")
        for dim in (64, 128, 256)
        for causal in (True, False)
    ),
    *(
        CudaCase(ids=kind, has_kv_ids=True, num_queries=nq, num_keys=nk, causal=causal)
        for kind in ("shuffled_padding", "documents")
        for nq, nk in ((200, 333), (333, 200))
        for causal in (True, False)
    ),
    *(
        CudaCase(num_queries=nq, num_keys=nk, causal=causal, dim=dim)
        for nq, nk in ((100, 400), (400, 100), (1, 500), (500, 1))
        for causal in (True, False)
        for dim in (64, 128, 256)
    ),
    *(
        CudaCase(window_left=left, window_right=right, causal=causal, num_queries=nq, num_keys=500)
        for left, right, causal in ((30, -1, True), (0, 0, False), (100, 70, False), (-1, 20, False), (3, -1, False))
        for nq in (500, 300)
    ),
    CudaCase(window_left=40, ids="documents"),
    CudaCase(window_left=40, window_right=9, causal=False, ids="blocks"),
    *(CudaCase(num_heads=8, num_kv_heads=heads, dim=dim) for heads in (1, 2, 8) for dim in (64, 128, 256)),
    *(CudaCase(has_grad_lse=True, ids=ids) for ids in (None, "padding_around", "shuffled_padding")),
    *(CudaCase(layout=layout, dim=dim) for layout in ("bnsd", "padded") for dim in (64, 128, 256)),
    *(CudaCase(qk_scale=scale) for scale in (0.01, 1.0)),
    *(
        CudaCase(softcap=cap, dim=dim, causal=causal, dtype=dtype)
        for cap in CAPS
        for dim in (64, 128, 256)
        for causal in (True, False)
        for dtype in (torch.bfloat16, torch.float16)
    ),
    *(
        CudaCase(softcap=cap, dim=dim, ids=kind, has_grad_lse=True)
        for cap in CAPS
        for dim in (64, 128, 256)
        for kind in ("documents", "shuffled_padding")
    ),
    *(
        CudaCase(softcap=4.0, qk_scale=-0.2, dim=dim, value_dim=40, num_heads=8, num_kv_heads=2, num_keys=500)
        for dim in (64, 96, 128, 192)
    ),
    *(CudaCase(softcap=4.0, dim=dim, causal=False, window_left=100, window_right=70) for dim in (64, 128, 256)),
    *(
        CudaCase(batch=48, num_queries=640, num_heads=8, num_kv_heads=4, dim=dim, ids=ids)
        for dim in (64, 128, 256)
        for ids in (None, "documents", "shuffled_padding")
    ),
    *(
        CudaCase(batch=20, num_queries=1024, num_kv_heads=kv_heads, dim=dim, ids=ids, causal=False)
        for kv_heads in (2, 4)
        for dim in (64, 128)
        for ids in (None, "documents", "shuffled_padding")
    ),
]


# Head dimensions that are no multiple of 8.
UNALIGNED = [
    *(CudaCase(dim=dim, dtype=dtype) for dim in UNALIGNED_DIMS for dtype in (torch.bfloat16, torch.float16)),
    *(CudaCase(dim=dim, value_dim=value_dim, causal=False) for dim, value_dim in UNALIGNED_PAIRS),
    *(CudaCase(dim=dim, layout=layout) for dim in (33, 99, 100, 250) for layout in UNALIGNED_LAYOUTS),
    *(CudaCase(num_queries=n, dim=99, layout="surrounded") for n in (1, 63, 64, 65, 128, 129, 640)),
    *(
        CudaCase(ids=kind, dim=dim, causal=causal)
        for kind in (*KINDS, "permuted", "padding_but_one_row")
        for dim in (63, 101, 129)
        for causal in (True, False)
    ),
    *(
        CudaCase(ids=kind, has_kv_ids=True, num_queries=nq, num_keys=nk, causal=causal, dim=99)
        for kind in ("shuffled_padding", "documents")
        for nq, nk in ((200, 333), (333, 200))
        for causal in (True, False)
    ),
    *(
        CudaCase(num_queries=nq, num_keys=nk, dim=dim)
        for nq, nk in ((100, 400), (400, 100), (1, 500), (500, 1))
        for dim in (31, 99, 255)
    ),
    *(
        CudaCase(window_left=left, window_right=right, causal=causal, num_queries=300, num_keys=500, dim=99)
        for left, right, causal in ((30, -1, True), (0, 0, False), (100, 70, False), (-1, 20, False))
    ),
    *(CudaCase(num_heads=8, num_kv_heads=heads, dim=dim) for heads in (1, 2, 8) for dim in (33, 99, 129)),
    *(CudaCase(has_grad_lse=True, has_sinks=True, ids=ids, dim=99) for ids in (None, "shuffled_padding")),
    *(CudaCase(softcap=cap, dim=dim, ids=ids) for cap in CAPS for dim in (33, 99, 255) for ids in (None, "blocks")),
    *(CudaCase(qk_scale=scale, dim=99) for scale in (0.01, -0.2)),
    *(long(dim=dim, ids=ids) for dim in (33, 99, 250) for ids in (None, "long_documents", "shuffled_padding")),
    long(1500, batch=8, num_heads=8, num_kv_heads=2, dim=99, layout="surrounded_bnsd"),
]


def several_launches(**fields) -> CudaCase:
    """Where only the device knows the form, for more batches than one launch of the fused form takes: 6 and 2."""
    return long(1500, **{"batch": 8, "num_heads": 16, "num_kv_heads": 16, "causal": False, **fields})


# The last groups are long enough for side jobs, too.
LONG = [
    *(long(n, dim=dim, causal=causal) for n in (2600, 2689) for dim in (64, 128) for causal in (True, False)),
    *(
        long(ids=kind, dim=dim, causal=causal)
        for kind in ("long_documents", "documents", "shuffled_padding", "blocks", "permuted", "one_row_reversed")
        for dim in (64, 128)
        for causal in (True, False)
    ),
    *(long(ids="long_documents", batch=3, dim=dim, num_kv_heads=heads) for dim in (64, 128) for heads in (1, 4)),
    *(long(nq, nk, dim=dim) for nq, nk in ((1500, 2900), (2900, 1500)) for dim in (64, 128)),
    *(long(nq, nk, ids="shuffled_padding", has_kv_ids=True) for nq, nk in ((1500, 2900), (2900, 1500))),
    *(
        long(window_left=left, window_right=right, causal=False)
        for left, right in ((1900, 20), (-1, 300), (1400, 1400))
    ),
    long(window_left=1700, ids="long_documents"),
    *(long(num_heads=8, num_kv_heads=heads, dim=dim) for heads in (1, 2, 8) for dim in (64, 128)),
    *(long(has_grad_lse=True, ids=ids) for ids in (None, "long_documents", "shuffled_padding")),
    *(long(layout=layout, dtype=torch.float16) for layout in ("bnsd", "padded")),
    *(long(dim=dim) for dim in (40, 72, 96)),
    *(
        long(softcap=cap, dim=dim, ids=ids, causal=causal)
        for cap in CAPS
        for dim in (64, 128)
        for ids in (None, "long_documents", "shuffled_padding")
        for causal in (True, False)
    ),
    *(long(softcap=30.0, dim=dim, num_heads=8, num_kv_heads=2, has_grad_lse=True) for dim in (64, 128, 256)),
    *(
        long(1500, batch=6, num_heads=heads, num_kv_heads=4, dim=dim, causal=False, ids=ids)
        for heads in (4, 8)
        for dim in (64, 128)
        for ids in (None, "long_documents", "shuffled_padding")
    ),
    # More tiles than thread blocks: those of grouped heads change their direction.
    *(long(1500, batch=8, num_heads=8, num_kv_heads=2, dim=dim) for dim in (64, 128, 256)),
    *(several_launches(dim=dim, ids="mostly_long_documents") for dim in (64, 128)),
    several_launches(ids="mostly_short_documents", has_grad_lse=True, layout="bnsd"),
]


def random_problem(seed: int, dims: tuple[int, ...] = tuple(range(8, 257, 8)), **fields: object) -> CudaCase:
    r = random.Random(seed)
    kv_heads = r.choice((1, 2, 3))
    dim = r.choice(dims)
    ids = r.choice((None, *KINDS, "separate"))
    num_queries = r.randint(1, 700)
    num_keys = num_queries if ids not in (None, "separate") else r.randint(1, 700)
    return CudaCase(
        batch=r.randint(1, 3),
        num_queries=num_queries,
        num_keys=num_keys,
        num_heads=kv_heads * r.choice((1, 2, 4)),
        num_kv_heads=kv_heads,
        dim=dim,
        value_dim=r.choice((0, r.choice(dims))),
        dtype=r.choice((torch.bfloat16, torch.float16)),
        ids="shuffled_padding" if ids == "separate" else ids,
        has_kv_ids=ids == "separate",
        causal=r.random() < 0.6,
        window_left=r.choice((-1, -1, r.randint(0, 300))),
        window_right=r.choice((-1, -1, r.randint(0, 300))),
        softcap=r.choice((0.0, 0.0, *CAPS)),
        has_grad_lse=r.random() < 0.3,
        layout=r.choice(("bsnd", "bnsd", "padded")),
    ).with_(**fields)


@pytest.mark.parametrize("problem", [*HAND_MADE, *LONG, *UNALIGNED], ids=str)
def test_backward_matches_float64(problem: CudaCase) -> None:
    check(problem)


@pytest.mark.parametrize("seed", range(80))
def test_backward_matches_float64_on_random_problems(seed: int) -> None:
    check(random_problem(seed))


@pytest.mark.parametrize("seed", range(80))
def test_backward_matches_float64_with_any_head_dimensions(seed: int) -> None:
    layout = random.Random(seed).choice(("bsnd", *UNALIGNED_LAYOUTS))
    check(random_problem(seed, tuple(range(1, 257)), layout=layout))


@pytest.mark.parametrize("problem", UNALIGNED, ids=str)
def test_deterministic_backward_matches_float64_with_unaligned_rows(problem: CudaCase, deterministic: None) -> None:
    check(problem)


DETERMINISTIC = [
    CudaCase(num_queries=1500, dim=dim, causal=causal, ids=ids, num_heads=8)
    for dim in (64, 128, 256)
    for causal in (True, False)
    for ids in (None, "documents", "padding_around", "blocks")
] + [
    CudaCase(num_queries=900, num_keys=1500, window_left=300),
    *(CudaCase(num_queries=1500, dim=dim, num_heads=8, ids=ids) for dim in (63, 99, 250) for ids in (None, "blocks")),
    *(
        CudaCase(num_queries=1500, dim=dim, ids=ids, num_heads=8, softcap=4.0)
        for dim in (64, 128, 256)
        for ids in (None, "padding_around", "blocks")
    ),
    CudaCase(num_queries=1500, num_keys=900, causal=False),
    CudaCase(num_queries=700, num_keys=900, ids="shuffled_padding", has_kv_ids=True),
    *(
        CudaCase(batch=48, num_queries=640, num_heads=8, num_kv_heads=4, dim=dim, ids="documents")
        for dim in (64, 128, 256)
    ),
]


@pytest.mark.parametrize("problem", DETERMINISTIC, ids=str)
def test_deterministic_backward_repeats_bitwise(problem: CudaCase, deterministic: None) -> None:
    inputs = Inputs(problem)
    first = inputs.run()
    inputs.assert_as_good(first)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, inputs.run(), strict=True))


@pytest.mark.parametrize("dim", (64, 128, 256))
def test_fast_backward_repeats_key_gradients_bitwise(dim: int) -> None:
    inputs = Inputs(CudaCase(num_queries=2000, num_heads=16, num_kv_heads=4, dim=dim))
    first = inputs.run()
    for _ in range(5):
        again = inputs.run()
        assert all(torch.equal(a, b) for a, b in zip(first[1:], again[1:], strict=True))
        assert norm_error(again[0], first[0]) < 5e-3


@pytest.mark.parametrize("ids", (None, "documents", "shuffled_padding"))
def test_backward_is_captured_by_a_graph_and_reads_new_values(ids: str | None) -> None:
    captured, fresh = (Inputs(CudaCase(ids=ids)) for _ in range(2))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        gradients = captured.run()
    for name, mine in captured.call.items():
        if isinstance(mine, Tensor):
            mine.copy_(fresh.call[name])
    graph.replay()
    torch.cuda.synchronize()
    fresh.assert_as_good(gradients)


@pytest.mark.parametrize("dim", (64, 128, 256))
def test_backward_bears_extreme_logsumexp(dim: int) -> None:
    inputs = Inputs(CudaCase(dim=dim, ids="padding_around"))
    lse = inputs.call["lse"].clone()
    lse[:, :, ::3] = lse[:, :, 1::3] = -math.inf
    dq, dk, dv = inputs.run(q=inputs.call["q"] * 0, lse=lse)
    assert all(gradient.isfinite().all() for gradient in (dq, dk, dv))
    assert (dq[:, ::3] == 0).all() and (dq[:, 1::3] == 0).all()


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 96, 100, 128, 192, 256])
def test_keys_past_the_end_count_nothing_beside_very_negative_logits(
    dim: int, dtype: torch.dtype, is_deterministic: bool
) -> None:
    """A tile's rows past the last key would have logits of 0, and exp(0 - lse) overflows."""
    size = math.sqrt(180 / math.sqrt(dim))
    q, k = (sign * size + 0.3 * torch.randn(1, 140, 2, dim, device="cuda") for sign in (1, -1))
    v, grad_out = torch.randn(2, 1, 140, 2, dim, device="cuda").to(dtype)
    call = {"q": q.to(dtype), "k": k.to(dtype), "v": v, "causal": False}
    exact = dense_attention(**call, grad_out=grad_out)
    assert exact["lse"].max() < -100
    out, lse = torch.ops.selfattn.flash_attention(**call)
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        gradients = torch.ops.selfattn.flash_attention_backward(grad_out, None, **call, out=out, lse=lse)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, mine in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert mine.isfinite().all(), name
        assert norm_error(mine, exact[name]) < 0.1, name


def test_backward_takes_expanded_gradients() -> None:
    inputs = Inputs(CudaCase(num_queries=128))
    grad_out = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, device="cuda").expand_as(inputs.call["grad_out"])
    expanded, copied = inputs.run(grad_out=grad_out), inputs.run(grad_out=grad_out.contiguous())
    assert torch.equal(expanded[1], copied[1])


def test_backward_names_what_it_cannot_do() -> None:
    inputs = Inputs(CudaCase(num_queries=64))
    with pytest.raises(ValueError, match="grad_out"):
        inputs.run(grad_out=inputs.call["grad_out"][:, 1:])
    with pytest.raises(NotImplementedError, match="head dimensions must be at most 256; got 384 and 384"):
        inputs.run(**{name: inputs.call[name].repeat(1, 1, 1, 3) for name in ("grad_out", "q", "k", "v", "out")})
