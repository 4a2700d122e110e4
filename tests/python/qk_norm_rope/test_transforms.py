"""qk_norm_rope under higher derivatives, function transforms, autocast, compilation and export."""

import pytest
import torch
from support.norm_rope import NormRopeCase
from torch import Tensor

import selfattn

CASE = NormRopeCase(dim=8, length=3, source="positions_of_rows")
SOURCES = ("nothing", "positions", "tables", "tables_of_a_part", None)
LEAVES = ("q", "k", "q_weight", "k_weight")


def case_of(source: str | None, **changes) -> NormRopeCase:
    if source == "tables_of_a_part":
        return CASE.with_(source="tables", rotary_dim=4, **changes)
    return CASE.with_(source=source, **changes)


def split(arguments: dict) -> tuple[dict[str, Tensor], dict]:
    """The tensors that want gradients, and the other arguments."""
    leaves = {name: value for name, value in arguments.items() if name in LEAVES}
    return leaves, {name: value for name, value in arguments.items() if name not in LEAVES}


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("source", SOURCES)
def test_derivatives_of_both_orders_in_float64(source: str | None, norm: bool, pairing: str, device: str) -> None:
    case = case_of(source, dtype=torch.float64, norm=norm, pairing=pairing, weights="float64", batch=1)
    arguments, _ = case.make(device)
    leaves, others = split(arguments)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return selfattn.qk_norm_rope(**dict(zip(leaves, values, strict=True)), **others)

    values = [leaf.requires_grad_() for leaf in leaves.values()]
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


def second_derivatives(arguments: dict) -> list[Tensor]:
    leaves, others = split(arguments)
    values = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    results = selfattn.qk_norm_rope(**values, **others)
    first = torch.autograd.grad(sum(r.square().sum() for r in results), list(values.values()), create_graph=True)
    return list(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), list(values.values())))


@pytest.mark.parametrize("dim", [16, 24])
def test_second_derivatives_of_the_kernels_equal_float64(dim: int, device: str) -> None:
    arguments, _ = CASE.with_(dim=dim).make(device)
    doubled = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    for actual, wanted in zip(second_derivatives(arguments), second_derivatives(doubled), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("source", ["tables", "tables_of_a_part"])
def test_tables_that_want_gradients_get_them(source: str, device: str) -> None:
    arguments, _ = case_of(source).make(device)
    tables = [arguments[name].requires_grad_() for name in ("freqs_sin", "freqs_cos")]
    results = selfattn.qk_norm_rope(**arguments)
    found = torch.autograd.grad(sum(r.square().sum() + r.sum() for r in results), tables)
    doubled = {
        name: value.detach().double() if isinstance(value, Tensor) else value for name, value in arguments.items()
    }
    exact = [doubled[name].requires_grad_() for name in ("freqs_sin", "freqs_cos")]
    results = selfattn.qk_norm_rope(**doubled)
    wanted = torch.autograd.grad(sum(r.square().sum() + r.sum() for r in results), exact)
    for actual, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual.double(), gradient, rtol=1e-4, atol=1e-4)


def test_vmap_equals_a_loop(device: str) -> None:
    arguments, _ = CASE.make(device)
    many = torch.stack([arguments["q"], 2 * arguments["q"] - 1])

    def function(q: Tensor) -> tuple[Tensor, Tensor]:
        return selfattn.qk_norm_rope(**(arguments | {"q": q}))

    found = torch.vmap(function)(many)
    for index, one in enumerate(many):
        for actual, wanted in zip(found, function(one), strict=True):
            torch.testing.assert_close(actual[index], wanted)


def test_func_grad_and_per_sample_gradients_equal_autograd(device: str) -> None:
    arguments, _ = CASE.make(device)

    def loss(q: Tensor, weight: Tensor) -> Tensor:
        results = selfattn.qk_norm_rope(**(arguments | {"q": q, "q_weight": weight}))
        return sum(result.square().sum() for result in results)

    q, weight = (arguments[name].clone().requires_grad_() for name in ("q", "q_weight"))
    wanted = torch.autograd.grad(loss(q, weight), (q, weight))
    found = torch.func.grad(loss, argnums=(0, 1))(q.detach(), weight.detach())
    for actual, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, gradient)
    twice = torch.stack([weight.detach()] * 2)
    each = torch.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0))(q.detach(), twice)
    torch.testing.assert_close(each[1], wanted[1])


def test_forward_mode_equals_a_difference_quotient(device: str) -> None:
    arguments, _ = CASE.with_(dtype=torch.float64).make(device)
    tangent, step = torch.randn_like(arguments["q"]), 1e-6

    def function(q: Tensor) -> Tensor:
        return selfattn.qk_norm_rope(**(arguments | {"q": q}))[0]

    q = arguments["q"]
    quotient = (function(q + step * tangent) - function(q - step * tangent)) / (2 * step)
    _, by_func = torch.func.jvp(function, (q,), (tangent,))
    torch.testing.assert_close(by_func, quotient, rtol=1e-6, atol=1e-7)
    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(q, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, by_func)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_nothing(dtype: torch.dtype, device: str) -> None:
    arguments, _ = CASE.with_(dtype=dtype, source="tables").make(device)
    wanted = selfattn.qk_norm_rope(**arguments)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = selfattn.qk_norm_rope(**arguments)
    for actual, result in zip(found, wanted, strict=True):
        assert actual.dtype == dtype and torch.equal(actual, result)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_equals_eager(dynamic: bool, source: str | None, device: str) -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def function(arguments: dict) -> tuple[Tensor, Tensor]:
        return selfattn.qk_norm_rope(**arguments)

    for length in (3, 6):
        arguments, _ = case_of(source, length=length).make(device)
        leaves, others = split(arguments)
        gradients = []
        for call in (function, lambda given: selfattn.qk_norm_rope(**given)):
            values = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
            results = call(values | others)
            loss = sum(result.square().sum() for result in results)
            gradients.append([*results, *torch.autograd.grad(loss, list(values.values()))])
        for actual, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, wanted)


def test_exported_with_a_dynamic_length() -> None:
    class NormRope(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return selfattn.qk_norm_rope(q, k, weight, weight)

    q, k, weight = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(8)
    length = torch.export.Dim("length", min=2, max=1000)
    program = torch.export.export(
        NormRope(), (q, k, weight), dynamic_shapes=({1: length}, {1: length}, None), strict=False
    )
    q, k = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 8)
    for actual, wanted in zip(program.module()(q, k, weight), selfattn.qk_norm_rope(q, k, weight, weight), strict=True):
        assert torch.equal(actual, wanted)


def test_scripted_equals_eager() -> None:
    @torch.jit.script
    def function(q: Tensor, k: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.selfattn.qk_norm_rope(q, k, weight, weight, pairing="half")

    q, k, weight = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(8)
    wanted = selfattn.qk_norm_rope(q, k, weight, weight, pairing="half")
    for _ in range(3):  # the profiling executor optimises after the first calls
        assert all(torch.equal(a, b) for a, b in zip(function(q, k, weight), wanted, strict=True))
