"""CUDA flash in float32: in either precision of PyTorch's switch as good as the formula in the same precision, whatever
the call; the switch is obeyed; results repeat; memory does not grow with the square of the row."""

import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from support.cases import UNALIGNED_DIMS, UNALIGNED_LAYOUTS, UNALIGNED_PAIRS, CudaCase, long
from support.memory import peak_of, poison_free_memory
from support.problems import dense_attention, make_ids
from torch import Tensor

import selfattn

pytestmark = pytest.mark.gpu

OPS = torch.ops.selfattn
PRECISIONS = ("ieee", "tf32")
TF32_STEP = 2**-11
"""Half the distance of neighbouring numbers in tf32, relative to them."""


def set_precision(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision


@pytest.fixture(autouse=True)
def own_switch() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    set_precision(before)


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    set_precision(request.param)
    return request.param


def case(**fields) -> CudaCase:
    return CudaCase(**{"dtype": torch.float32, "spread": 1.0, **fields})


def run(problem: CudaCase) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The call, and out, lse, dq, dk and dv of the operators."""
    tensors, grads = problem.tensors(device="cuda"), problem.grads(device="cuda")
    poison_free_memory(1 << 24)
    out, lse = OPS.flash_attention(**tensors, **problem.options)
    call = {"grad_lse": None, **tensors, **grads, **problem.options}
    of_backward = {name: value for name, value in call.items() if name != "sinks"}  # lse tells of them
    gradients = OPS.flash_attention_backward(**of_backward, out=out, lse=lse)
    return call, {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def size(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def check(problem: CudaCase, floor: float = 1.5e-7) -> None:
    """The error is at most twice that of the formula, whose products PyTorch multiplies in the same precision. `floor`:
    of the results' size, where the formula is exact by chance, as in rows of one key. Gradients come from lse in
    float32, whose rounding is felt in the weights; the formula has these from its own sums."""
    call, results = run(problem)
    exact = dense_attention(**call)
    peers = dense_attention(**call, precision=torch.float32)
    allowed = problem.allowed(call)
    sees, is_seen = allowed.any(-1)[:, 0], allowed.any(-2)[:, 0]
    for name, used in {"out": sees, "dq": sees, "dk": is_seen, "dv": is_seen}.items():
        assert results[name].isfinite().all(), f"{name} is not finite"
        assert (results[name][~used] == 0).all(), f"{name}: rows without a pair are not zero"
    finite = exact["lse"].isfinite()
    assert torch.equal(results["lse"][~finite], exact["lse"][~finite].float())
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        # PyTorch does not round the operands of products as thin as these, of which there are two.
        is_thin = min(problem.dim, problem.value_dim or problem.dim) < 4
        floor += 2 * TF32_STEP if is_thin else TF32_STEP
    if not finite.any():
        results.pop("lse")
    of_lse = 2**-24 * exact["lse"][finite].abs().max().item() if finite.any() else 0.0
    for name, mine in results.items():
        counted = finite if name == "lse" else ...
        error, allowance = (size(x[counted].double() - exact[name][counted]) for x in (mine, peers[name]))
        # Gradients of rows of one key, and logits near 0, have only the rounding of what they are summed of.
        of_all = floor + (of_lse if name[0] == "d" else 0.0)
        assert error <= 2 * allowance + of_all * max(size(exact[name][counted]), 0.1 if name == "out" else 1.0), (
            f"{name}: error {error:.2e}, the formula's {allowance:.2e}"
        )


KINDS = ("documents", "padding_around", "short_documents", "one_row_reversed", "named_padding", "shuffled_padding")
PROBLEMS = [
    *(case(num_queries=n, dim=dim) for n in (1, 63, 64, 65, 129, 640) for dim in (64, 128, 256)),
    *(case(num_queries=n, dim=dim, causal=False) for n in (1, 128, 257) for dim in (64, 128, 256)),
    *(case(dim=dim, value_dim=value_dim) for dim, value_dim in ((4, 4), (12, 20), (36, 100), (64, 192), (252, 4))),
    *(
        case(ids=ids, dim=dim, causal=causal)
        for ids in (*KINDS, "blocks", "permuted", "all_padding", "padding_but_one_row")
        for dim in (64, 128, 256)
        for causal in (True, False)
    ),
    *(
        case(ids=ids, has_kv_ids=True, num_queries=nq, num_keys=nk, causal=causal)
        for ids in ("shuffled_padding", "documents")
        for nq, nk in ((200, 333), (333, 200))
        for causal in (True, False)
    ),
    *(
        case(num_queries=nq, num_keys=nk, causal=causal, dim=dim)
        for nq, nk in ((100, 400), (400, 100), (1, 500), (500, 1))
        for causal in (True, False)
        for dim in (64, 128, 256)
    ),
    *(
        case(window_left=left, window_right=right, causal=causal, num_queries=nq, num_keys=500)
        for left, right, causal in ((30, -1, True), (0, 0, False), (100, 70, False), (-1, 20, False))
        for nq in (500, 300)
    ),
    case(window_left=40, window_right=9, causal=False, ids="blocks", dim=64),
    *(case(num_heads=8, num_kv_heads=heads, dim=dim) for heads in (1, 8) for dim in (64, 128, 256)),
    *(case(has_sinks=True, ids=ids, dim=dim) for ids in (None, "shuffled_padding") for dim in (64, 128, 256)),
    *(case(has_grad_lse=True, ids=ids) for ids in (None, "padding_around", "shuffled_padding")),
    *(case(softcap=softcap, ids="blocks", dim=dim) for softcap in (0.5, 30.0, 1e4) for dim in (64, 128, 256)),
    *(case(layout=layout, dim=dim) for layout in ("bnsd", "padded", "odd", "surrounded") for dim in (64, 128, 256)),
    *(case(qk_scale=scale, spread=3.0) for scale in (0.01, 1.0, -0.2)),
    *(long(2700, dtype=torch.float32, ids=ids, dim=dim) for ids in (None, "long_documents") for dim in (64, 128, 256)),
    long(2700, dtype=torch.float32, ids="shuffled_padding", causal=False),
    *(case(batch=48, num_queries=640, num_heads=8, dim=64, ids=ids) for ids in (None, "documents", "shuffled_padding")),
    *(case(dim=dim) for dim in UNALIGNED_DIMS),
    *(case(dim=dim, value_dim=value_dim, causal=False) for dim, value_dim in UNALIGNED_PAIRS),
    *(case(dim=dim, layout=layout) for dim in (33, 99, 250) for layout in UNALIGNED_LAYOUTS),
    *(case(dim=dim, ids=ids, has_sinks=True) for dim in (63, 101, 129) for ids in (*KINDS, "blocks", "permuted")),
    *(case(dim=99, num_queries=nq, num_keys=nk) for nq, nk in ((100, 400), (400, 100), (1, 500), (500, 1))),
    *(case(dim=dim, softcap=softcap, ids="blocks") for softcap in (0.5, 1e4) for dim in (31, 99, 255)),
    case(dim=99, window_left=100, window_right=70, causal=False, num_heads=8, num_kv_heads=2, has_grad_lse=True),
    *(long(2700, dtype=torch.float32, dim=dim, ids="long_documents") for dim in (33, 99, 250)),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_as_good_as_the_formula(problem: CudaCase, precision: str) -> None:
    check(problem)


def random_problem(seed: int, multiple: int = 4, **fields: object) -> CudaCase:
    r = random.Random(seed)
    kv_heads = r.choice((1, 2, 3))
    ids = r.choice((None, *KINDS, "blocks", "separate"))
    num_queries = r.randint(1, 700)
    return case(
        batch=r.randint(1, 3),
        num_queries=num_queries,
        num_keys=num_queries if ids not in (None, "separate") else r.randint(1, 700),
        num_heads=kv_heads * r.choice((1, 2, 4)),
        num_kv_heads=kv_heads,
        dim=multiple * r.randint(1, 256 // multiple),
        value_dim=r.choice((0, multiple * r.randint(1, 256 // multiple))),
        ids="shuffled_padding" if ids == "separate" else ids,
        has_kv_ids=ids == "separate",
        causal=r.random() < 0.6,
        window_left=r.choice((-1, -1, r.randint(0, 300))),
        window_right=r.choice((-1, -1, r.randint(0, 300))),
        softcap=r.choice((0.0, 0.0, 3.0)),
        has_sinks=r.random() < 0.3,
        has_grad_lse=r.random() < 0.3,
        layout=r.choice(("bsnd", "bnsd", "padded")),
    ).with_(**fields)


@pytest.mark.parametrize("seed", range(60))
def test_random_problems_are_as_good_as_the_formula(seed: int, precision: str) -> None:
    check(random_problem(seed))


@pytest.mark.parametrize("seed", range(60))
def test_random_problems_with_any_head_dimensions_are_as_good_as_the_formula(seed: int, precision: str) -> None:
    check(random_problem(seed, multiple=1, layout=random.Random(seed).choice(("bsnd", *UNALIGNED_LAYOUTS))))


# ---------------------------------------------------------------- the switch


def errors(problem: CudaCase) -> dict[str, float]:
    call, results = run(problem)
    exact = dense_attention(**call)
    return {name: size(mine.double() - exact[name]) / size(exact[name]) for name, mine in results.items()}


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_switch_has_an_effect_on_every_product(dim: int) -> None:
    problem = case(num_queries=500, dim=dim, causal=False)
    found = {}
    for precision in PRECISIONS:
        torch.manual_seed(1)
        set_precision(precision)
        found[precision] = errors(problem)
    for name in ("out", "dq", "dk", "dv"):
        assert found["ieee"][name] < 1e-6, found
        assert 1e-4 < found["tf32"][name] < 4e-3, found


def test_precision_is_that_of_pytorchs_products_by_default() -> None:
    torch.manual_seed(1)
    set_precision("ieee")
    _, expected = run(case())
    torch.manual_seed(1)
    set_precision("none")
    _, found = run(case())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_older_name_of_the_switch() -> None:
    set_precision("tf32")
    torch.manual_seed(1)
    _, expected = run(case())
    set_precision("ieee")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(1)
        _, found = run(case())
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("of_backward", PRECISIONS)
def test_backward_asks_the_switch_when_it_runs(of_backward: str) -> None:
    q, k, v, grad = (torch.randn(2, 300, 4, 64, device="cuda") for _ in range(4))
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    set_precision("ieee" if of_backward == "tf32" else "tf32")
    out, lse = OPS.flash_attention(*leaves)
    set_precision(of_backward)
    found = torch.autograd.grad(out, leaves, grad)
    out, lse = out.detach(), lse.detach()
    expected = OPS.flash_attention_backward(grad, None, q, k, v, out, lse)
    set_precision("ieee" if of_backward == "tf32" else "tf32")
    other = OPS.flash_attention_backward(grad, None, q, k, v, out, lse)
    for mine, same, different in zip(found, expected, other, strict=True):
        assert torch.equal(mine, same) and not torch.equal(mine, different)


# ---------------------------------------------------------------- extremes


@pytest.mark.parametrize("largest", [1e2, 1.4e3, 1e4, 1e6, 1e9, 1e11])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_large_logits_are_as_good_as_in_the_formula(dim: int, largest: float) -> None:
    """lse in float32 is right to half a step, which is felt in the weights of the backward pass."""
    set_precision("ieee")
    q, k = (torch.randn(2, 300, 2, dim, device="cuda") * math.sqrt(largest / 4) for _ in range(2))
    v, grad = (torch.randn(2, 300, 2, dim, device="cuda") for _ in range(2))
    out, lse = OPS.flash_attention(q, k, v)
    gradients = OPS.flash_attention_backward(grad, None, q, k, v, out, lse)
    exact = dense_attention(q, k, v, grad_out=grad)
    peers = dense_attention(q, k, v, grad_out=grad, precision=torch.float32)
    rounding = min(1e-6 + 2**-23 * largest, 1.0)
    for name, mine in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True):
        assert mine.isfinite().all(), f"{name} is not finite"
        error, allowance = ((x.double() - exact[name]).abs().max().item() for x in (mine, peers[name]))
        floor = rounding if name != "out" else 1e-6
        assert error <= 2 * allowance + floor * max(exact[name].abs().max().item(), 1.0), f"{name}: {error:.2e}"


@pytest.mark.parametrize("scale", [-0.2, -0.0, 0.0, -3.0, 1e-320, -1e-300, 1e300])
def test_every_finite_scale(scale: float, precision: str) -> None:
    q, k, v, grad = (torch.randn(2, 200, 2, 64, device="cuda") for _ in range(4))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = selfattn.multihead_attention(*leaves, qk_scale=scale, backend="flash")
    assert out.isfinite().all()
    if abs(scale) < 1e100:
        gradients = torch.autograd.grad(out, leaves, grad)
        exact = dense_attention(q, k, v, qk_scale=scale, grad_out=grad)
        for name, mine in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True):
            limit = max(exact[name].abs().max().item(), 0.3)
            error = (mine.detach().double() - exact[name]).abs().max().item()
            assert error <= (1e-5 if precision == "ieee" else 1e-2) * limit, name


@pytest.mark.parametrize("where", ["k", "q"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_logits_of_minus_infinity_have_no_weight(dim: int, where: str, precision: str) -> None:
    """Products whose operands are split would make NaN of them."""
    q, k, v, grad = (torch.randn(1, 100, 1, dim, device="cuda") for _ in range(4))
    q, k = q.abs(), k.abs()
    ids = torch.zeros(1, 100, dtype=torch.int32, device="cuda")
    query_ids, key_ids = ids.clone(), ids.clone()
    (key_ids if where == "k" else query_ids)[:, 7] = 1
    infinite = {"q": q, "k": k}
    infinite[where] = infinite[where].clone()
    infinite[where][:, 7, :, 3] = -math.inf

    def results(q: Tensor, k: Tensor, **ids: Tensor) -> list[Tensor]:
        out, lse = OPS.flash_attention(q, k, v, causal=False, **ids)
        return [out, lse, *OPS.flash_attention_backward(grad, None, q, k, v, out, lse, causal=False, **ids)]

    masked = results(q, k, segment_ids=query_ids, kv_segment_ids=key_ids)
    for mine, expected in zip(results(**infinite), masked, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("value", [3e38, -1e36, math.nan, math.inf])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_values_too_large_to_be_split_are_multiplied_all_the_same(dim: int, value: float, precision: str) -> None:
    q, k, v = (torch.randn(1, 100, 1, dim, device="cuda") for _ in range(3))
    v[0, 40, 0, 5] = value
    out, _ = OPS.flash_attention(q, k, v)
    expected = dense_attention(q, k, v)["out"]
    assert torch.equal(out[0, :40], OPS.flash_attention(q[:, :40], k[:, :40], v[:, :40])[0][0])
    if math.isfinite(value):
        torch.testing.assert_close(out[0, 40:, 0, 5].double(), expected[0, 40:, 0, 5], rtol=1e-2, atol=1e-2)
    else:
        assert not out[0, 40:, 0, 5].isfinite().any()
    others = [column for column in range(dim) if column != 5]
    assert out[..., others].isfinite().all()


# ---------------------------------------------------------------- repeatability and memory


@pytest.mark.parametrize("ids", [None, "documents", "shuffled_padding"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_results_repeat_bitwise_without_being_asked_to(dim: int, ids: str | None, precision: str) -> None:
    problem = case(num_queries=1500, num_heads=8, dim=dim, ids=ids)
    torch.manual_seed(1)
    _, first = run(problem)
    for _ in range(3):
        torch.manual_seed(1)
        _, again = run(problem)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("what", ["", "large_logits", "nan_in_k", "nan_in_v", "nan_in_grad"])
@pytest.mark.parametrize("ids", [None, "packed", "shuffled"])
@pytest.mark.parametrize("dim", [64, 99, 128, 250, 256])
def test_gradients_over_the_inputs_are_the_same(dim: int, ids: str | None, what: str, precision: str) -> None:
    q, k, v, grad = (torch.randn(2, 300, 4, dim, device="cuda") for _ in range(4))
    tables = () if ids is None else (make_ids(ids, 2, 300).cuda(),)
    if what == "large_logits":
        q *= 3600
    elif what:
        {"nan_in_k": k, "nan_in_v": v, "nan_in_grad": grad}[what][:, 150] = math.nan
    out, lse = OPS.flash_attention(q, k, v, *tables)
    wanted = OPS.flash_attention_backward(grad, None, q, k, v, out, lse, *tables)
    dq, dk, dv = out.clone(), k.clone(), v.clone()
    OPS.flash_attention_backward.into(grad, None, q, dk, dv, dq, lse, *tables, dq=dq, dk=dk, dv=dv)
    for found, expected in zip((dq, dk, dv), wanted, strict=True):
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("ids", [None, "documents", "shuffled"])
def test_memory_grows_with_the_length_of_the_row(ids: str | None, precision: str) -> None:
    length = 16384
    q, k, v, grad = (torch.randn(1, length, 2, 64, device="cuda") for _ in range(4))
    tables = None if ids is None else make_ids(ids, 1, length).cuda()

    def step() -> None:
        out, lse = OPS.flash_attention(q, k, v, tables)
        OPS.flash_attention_backward(grad, None, q, k, v, out, lse, tables)

    tensor = q.numel() * 4  # out, dq, dk, dv; lse, statistics and tables
    assert peak_of(step) < 5 * tensor


def test_tensors_of_more_than_2_31_elements() -> None:
    """Of one key head; a window keeps the work small."""
    length, heads, dim = 70_000, 256, 128
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GB of memory")
    q = torch.randn(1, length, heads, dim, device="cuda")
    k, v = (torch.randn(1, length, 1, dim, device="cuda") for _ in range(2))
    assert q.numel() > 2**31
    call = {"window_left": 3}
    out, lse = OPS.flash_attention(q, k, v, **call)
    dq, dk, _ = OPS.flash_attention_backward(out, None, q, k, v, out, lse, **call)
    assert dk.isfinite().all()
    for head in (0, heads - 1):
        one = q[:, :, head : head + 1].contiguous()
        alone, own_lse = OPS.flash_attention(one, k, v, **call)
        own = OPS.flash_attention_backward(alone, None, one, k, v, alone, own_lse, **call)
        assert torch.equal(out[:, :, head], alone[:, :, 0]) and torch.equal(dq[:, :, head], own[0][:, :, 0])


@pytest.mark.parametrize("ids", [None, "documents", "shuffled_padding"])
def test_graph_replays_with_other_values(ids: str | None, precision: str) -> None:
    captured, fresh = (case(ids=ids).tensors(device="cuda") for _ in range(2))
    grad = torch.randn_like(captured["q"])

    def step(tensors: dict[str, Tensor]) -> list[Tensor]:
        out, lse = OPS.flash_attention(**tensors)
        return [out, lse, *OPS.flash_attention_backward(grad, None, out=out, lse=lse, **tensors)]

    step(captured)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(captured)
    for name, tensor in captured.items():
        tensor.copy_(fresh[name])
    graph.replay()
    assert all(torch.equal(mine, expected) for mine, expected in zip(results, step(fresh), strict=True))


def test_auto_takes_the_kernels() -> None:
    q = torch.randn(1, 64, 2, 64, device="cuda")
    ids = torch.zeros(1, 64, dtype=torch.int32, device="cuda")
    assert selfattn.explain_backend(q, q, q, ids).startswith("flash: chosen")


@pytest.mark.parametrize("dims", [(257, 8), (8, 257), (260, 64)])
def test_head_dimensions_that_are_refused(dims: tuple[int, int]) -> None:
    q, v = (torch.randn(1, 8, 1, dim, device="cuda") for dim in dims)
    call: Callable = OPS.flash_attention
    with pytest.raises(NotImplementedError, match="head dimensions must be at most 256"):
        call(q, q, v)
