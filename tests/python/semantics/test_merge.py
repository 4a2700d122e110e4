"""merge_attention joins results over disjoint keys into the result over all of them, gradients included, never NaN."""

import math

import pytest
import torch
from support import reference
from support.cases import ID_KINDS, ROUNDING
from support.problems import error, make_ids
from support.serving_table import describe, skip_refused
from torch import Tensor

import selfattn

GRADIENT_TOLERANCE = {torch.float64: 5e-6, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
PLACES = [
    *(pytest.param("cpu", backend, id=f"cpu-{backend}") for backend in ("reference", "flash", "auto")),
    *(
        pytest.param("cuda", backend, id=f"cuda-{backend}", marks=pytest.mark.gpu)
        for backend in ("reference", "flash", "auto")
    ),
]
INF = math.inf


@pytest.mark.parametrize("bounds", [(7,), (5, 11), (0, 16)], ids=["two_parts", "three_parts", "two_parts_empty"])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("kind", [*ID_KINDS, None])
@pytest.mark.parametrize("dtype", ROUNDING, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_parts_merge_into_the_whole(
    device: str, backend: str, dtype: torch.dtype, kind: str | None, has_sinks: bool, bounds: tuple[int, ...]
) -> None:
    q, k, v = (torch.randn(2, 16, heads, 8).to(device, dtype).requires_grad_() for heads in (4, 2, 2))
    sinks = torch.randn(4, device=device).requires_grad_() if has_sinks else None
    leaves = [q, k, v] if sinks is None else [q, k, v, sinks]
    ids = None if kind is None else make_ids(kind, 2, 16).to(device)

    def part(first: int, end: int, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return selfattn.multihead_attention_lse(
            q,
            k[:, first:end],
            v[:, first:end],
            ids,
            False,
            backend=backend,
            kv_segment_ids=None if ids is None else ids[:, first:end],
            sinks=sinks,
        )

    try:
        out, lse = part(0, bounds[0], sinks)
        for first, end in zip(bounds, (*bounds[1:], 16), strict=True):
            out, lse = selfattn.merge_attention(out, lse, *part(first, end))
    except NotImplementedError as refusal:
        fewest = min(end - first for first, end in zip((0, *bounds), (*bounds, 16), strict=True))
        smallest = describe(q, k[:, :fewest], v[:, :fewest], ids, False, sinks=sinks, wants_lse=True)
        skip_refused(refusal, backend, smallest)
    expected, expected_lse = reference.attention(q, k, v, ids, causal=False, sinks=sinks)
    assert out.dtype == dtype and lse.dtype == torch.float32
    # Each part was rounded to the dtype before, and each lse to float32.
    assert error(out, expected) < 2 * max(ROUNDING[dtype], 1e-6)
    assert error(lse, expected_lse) < max(ROUNDING[dtype], 1e-6)

    grad_out = torch.randn(out.shape).to(dtype)
    finite = expected_lse.isfinite()
    grad_lse = torch.where(finite, torch.randn(lse.shape), 0.0)
    actual = torch.autograd.grad((out, lse), leaves, (grad_out.to(device), grad_lse.to(device)), materialize_grads=True)
    loss = (expected * grad_out.double()).sum() + (expected_lse[finite] * grad_lse[finite].double()).sum()
    for gradient, oracle in zip(actual, reference.gradients(loss, leaves), strict=True):
        assert error(gradient, oracle) < GRADIENT_TOLERANCE[dtype]


def random_parts(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (1, 3, 2, 2), (1, 2, 3), (1, 3, 2, 2), (1, 2, 3)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def test_derivatives_of_both_orders() -> None:
    parts = random_parts()
    assert torch.autograd.gradcheck(selfattn.merge_attention, parts, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(selfattn.merge_attention, parts)


def test_derivatives_of_equal_parts() -> None:
    # Where the larger of two is neither, a formula made of absolute values has no derivative.
    parts = [part.detach().clone().requires_grad_() for part in random_parts()[:2] * 2]
    assert torch.autograd.gradcheck(selfattn.merge_attention, parts)
    assert torch.autograd.gradgradcheck(selfattn.merge_attention, parts)


@pytest.mark.parametrize("empty", ["left", "right", "both"])
def test_derivatives_beside_rows_without_keys(empty: str) -> None:
    out, lse, other_out, other_lse = random_parts()
    rows = torch.tensor([[[True, False, True], [False, False, True]]])
    hidden = lse.detach().masked_fill(rows, -INF) if empty != "right" else lse
    other_hidden = other_lse.detach().masked_fill(rows, -INF) if empty != "left" else other_lse

    def function(out: Tensor, other_out: Tensor) -> tuple[Tensor, Tensor]:
        merged, merged_lse = selfattn.merge_attention(out, hidden, other_out, other_hidden)
        return merged, merged_lse.masked_fill(merged_lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(function, (out, other_out))
    assert torch.autograd.gradgradcheck(function, (out, other_out))


@pytest.mark.parametrize("dtype", ROUNDING, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("left", [-INF, INF, 0.5, -80.0, 1e30])
@pytest.mark.parametrize("right", [-INF, INF, 0.5, 80.0, -1e30])
def test_no_gradient_of_any_pair_of_logarithms_is_nan(left: float, right: float, dtype: torch.dtype) -> None:
    out, other_out = (torch.randn(1, 2, 3, 4).to(dtype).requires_grad_() for _ in range(2))
    lse, other_lse = (torch.full((1, 3, 2), value, requires_grad=True) for value in (left, right))
    leaves = out, lse, other_out, other_lse
    merged, merged_lse = selfattn.merge_attention(*leaves)
    share = 0.5 if left == right else 1 / (1 + math.exp(min(right - left, 700)))
    if left == right == -INF:
        share = 0.0
    other_share = 0.0 if left == right == -INF else 1 - share
    assert error(merged, share * out.double() + other_share * other_out.double()) < ROUNDING[dtype]
    torch.testing.assert_close(merged_lse, torch.logaddexp(lse, other_lse))
    assert merged.dtype == dtype and merged_lse.dtype == torch.float32

    grads = torch.randn_like(merged), torch.randn_like(merged_lse)
    first = torch.autograd.grad((merged, merged_lse), leaves, grads, create_graph=True)
    assert all(gradient.isfinite().all() for gradient in first)
    assert error(first[0], share * grads[0].double()) < ROUNDING[dtype]
    assert error(first[2], other_share * grads[0].double()) < ROUNDING[dtype]
    if INF in (left, right):  # nothing moves the weights, and all of the logarithm's gradient goes to what has them
        assert error(first[1], share * grads[1].double()) < 1e-6 or left == right
        assert error(first[1] + first[3], grads[1]) < 2e-2
    second = torch.autograd.grad(
        first, leaves, [torch.randn_like(gradient) for gradient in first], allow_unused=True, materialize_grads=True
    )
    assert all(gradient.isfinite().all() for gradient in second)


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_row_without_keys_adds_nothing_whatever_it_holds(poison: float) -> None:
    out, lse, other_out, other_lse = (part.detach() for part in random_parts(torch.float32))
    expected = selfattn.merge_attention(out, torch.full_like(lse, -INF), other_out, other_lse)
    actual = selfattn.merge_attention(torch.full_like(out, poison), torch.full_like(lse, -INF), other_out, other_lse)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert torch.equal(actual[0], other_out) and torch.equal(actual[1], other_lse)


def test_float64_logarithms_keep_their_precision() -> None:
    out, lse, other_out, other_lse = (part.detach() for part in random_parts())
    merged, merged_lse = selfattn.merge_attention(out.bfloat16(), lse, other_out.bfloat16(), other_lse)
    assert merged.dtype == torch.bfloat16 and merged_lse.dtype == torch.float64
    torch.testing.assert_close(merged_lse, torch.logaddexp(lse, other_lse), rtol=1e-14, atol=1e-14)


def test_vmap_equals_a_loop() -> None:
    parts = [torch.stack([part.detach(), 2 * part.detach(), -part.detach()]) for part in random_parts()]
    expected = [selfattn.merge_attention(*(part[i] for part in parts)) for i in range(3)]
    actual = torch.vmap(selfattn.merge_attention)(*parts)
    for one, results in zip(actual, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(results))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_merge_serves_any_length(compiler: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(selfattn.merge_attention, fullgraph=True, dynamic=True, backend=compiler)
    for length in (5, 9, 12):
        out, other_out = (torch.randn(2, length, 4, 8, requires_grad=True) for _ in range(2))
        lse, other_lse = (torch.randn(2, 4, length, requires_grad=True) for _ in range(2))
        leaves = out, lse, other_out, other_lse
        actual, expected = compiled(*leaves), selfattn.merge_attention(*leaves)
        torch.testing.assert_close(actual, expected)
        gradients = [torch.autograd.grad([r.sum() for r in results], leaves) for results in (actual, expected)]
        torch.testing.assert_close(*gradients)


def test_exported_merge_serves_any_length() -> None:
    class Merge(torch.nn.Module):
        def forward(self, out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
            return selfattn.merge_attention(out, lse, other_out, other_lse)

    length = torch.export.Dim("length", min=2, max=1024)
    shapes = {1: length}, {2: length}, {1: length}, {2: length}
    example = torch.randn(2, 6, 4, 8), torch.randn(2, 4, 6), torch.randn(2, 6, 4, 8), torch.randn(2, 4, 6)
    program = torch.export.export(Merge(), example, dynamic_shapes=shapes).module()
    others = torch.randn(2, 9, 4, 8), torch.randn(2, 4, 9), torch.randn(2, 9, 4, 8), torch.randn(2, 4, 9)
    torch.testing.assert_close(program(*others), selfattn.merge_attention(*others))


def test_scripted_merge_equals_the_function() -> None:
    @torch.jit.script
    def function(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.selfattn.merge_attention(out, lse, out * 2, lse - 1)

    out, lse = torch.randn(2, 6, 4, 8), torch.randn(2, 4, 6)
    for _ in range(3):
        torch.testing.assert_close(function(out, lse), selfattn.merge_attention(out, lse, out * 2, lse - 1))


OUT, LSE = torch.zeros(2, 6, 4, 8), torch.zeros(2, 4, 6)
ROWS = r"must have the shape \(B, NH, Sq\) = \[2, 4, 6\]"


@pytest.mark.parametrize(
    ("arguments", "error_type", "message"),
    [
        ((OUT.int(), LSE, OUT, LSE), TypeError, "out must be float64, float32, bfloat16 or float16; got Int"),
        ((OUT[0], LSE, OUT, LSE), ValueError, r"out must have four dimensions \(B, Sq, NH, DV\); got shape \[6, 4, 8"),
        ((OUT, LSE.half(), OUT, LSE), TypeError, "lse must be float32 or float64; got Half"),
        ((OUT, LSE.mT, OUT, LSE), ValueError, rf"lse {ROWS}; got \[2, 6, 4\]"),
        ((OUT, LSE[0], OUT, LSE), ValueError, rf"lse {ROWS}; got \[4, 6\]"),
        ((OUT, LSE.to("meta"), OUT, LSE), TypeError, "lse must be on the device of out, cpu; got meta"),
        ((OUT, LSE, OUT.double(), LSE), TypeError, "other_out must have the dtype of out, Float; got Double"),
        ((OUT, LSE, OUT.to("meta"), LSE), TypeError, "other_out must be on the device of out, cpu; got meta"),
        ((OUT, LSE, OUT[:1], LSE), ValueError, r"other_out must have the shape of out, \[2, 6, 4, 8\]; got \[1, 6, 4"),
        ((OUT, LSE, OUT, LSE.double()), TypeError, "other_lse must have the dtype of lse, Float; got Double"),
        ((OUT, LSE, OUT, LSE[:1]), ValueError, rf"other_lse {ROWS}; got \[1, 4, 6\]"),
        ((OUT, LSE, OUT, LSE.to("meta")), TypeError, "other_lse must be on the device of out, cpu; got meta"),
    ],
)
def test_bad_argument_is_named(arguments: tuple, error_type: type[Exception], message: str) -> None:
    with pytest.raises(error_type, match=f"^selfattn: {message}"):
        selfattn.merge_attention(*arguments)


def test_empty_parts_merge() -> None:
    for shape in ((0, 6, 4, 8), (2, 0, 4, 8), (2, 6, 4, 0)):
        lse = torch.zeros(shape[0], shape[2], shape[1])
        out, merged_lse = selfattn.merge_attention(torch.zeros(shape), lse, torch.zeros(shape), lse)
        assert out.shape == shape and merged_lse.shape == lse.shape
