"""Function transforms and higher derivatives go through the reference, also where "auto" has to find it; vmap alone
goes through the kernels too."""

import pytest
import torch
from support.problems import error, make_ids

import selfattn

BACKENDS = ["reference", "auto"]
BACKENDS_OF_VMAP = [*BACKENDS, "flash"]


def make_inputs(length: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (torch.randn(2, length, heads, 8) for heads in (4, 2, 2))
    return q, k, v, make_ids("shuffled", 2, length)


@pytest.mark.parametrize("backend", BACKENDS_OF_VMAP)
def test_vmap_equals_a_loop(backend: str) -> None:
    q, k, v, ids = make_inputs()
    many = torch.stack([q, 2 * q, q - 1])

    def function(q: torch.Tensor) -> torch.Tensor:
        return selfattn.multihead_attention(q, k, v, ids, backend=backend)

    torch.testing.assert_close(torch.vmap(function)(many), torch.stack([function(one) for one in many]))


@pytest.mark.parametrize("backend", BACKENDS_OF_VMAP)
def test_vmap_over_ids_equals_a_loop(backend: str) -> None:
    q, k, v, _ = make_inputs()
    many = torch.stack([make_ids(kind, 2, 6) for kind in ("shuffled", "packed", "mixed_padding")])

    def function(ids: torch.Tensor) -> torch.Tensor:
        return selfattn.multihead_attention(q, k, v, ids, backend=backend)

    torch.testing.assert_close(torch.vmap(function)(many), torch.stack([function(one) for one in many]))


def test_batched_gradients_of_the_reference_equal_a_loop() -> None:
    q, k, v, ids = make_inputs()
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = selfattn.multihead_attention(*leaves, ids, backend="reference")
    grads = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, leaves, grad, retain_graph=True) for grad in grads]
    for actual, expected in zip(batched, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad_equals_autograd(backend: str) -> None:
    q, k, v, ids = make_inputs()

    def loss(q: torch.Tensor) -> torch.Tensor:
        return selfattn.multihead_attention(q, k, v, ids, backend=backend).square().sum()

    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(q), torch.autograd.grad(loss(leaf), leaf)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_jvp_equals_a_difference_quotient(backend: str) -> None:
    q, k, v, ids = (tensor.double() if tensor.is_floating_point() else tensor for tensor in make_inputs())
    tangent = torch.randn_like(q)

    def function(q: torch.Tensor) -> torch.Tensor:
        return selfattn.multihead_attention(q, k, v, ids, backend=backend)

    _, derivative = torch.func.jvp(function, (q,), (tangent,))
    step = 1e-5
    quotient = (function(q + step * tangent) - function(q - step * tangent)) / (2 * step)
    torch.testing.assert_close(derivative, quotient, rtol=1e-6, atol=1e-8)


def test_forward_mode_equals_jvp() -> None:
    q, k, v, ids = make_inputs()
    tangent = torch.randn_like(q)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, tangent)
        out = selfattn.multihead_attention(dual, k, v, ids)
        derivative = torch.autograd.forward_ad.unpack_dual(out).tangent
    _, expected = torch.func.jvp(
        lambda q: selfattn.multihead_attention(q, k, v, ids, backend="reference"), (q,), (tangent,)
    )
    torch.testing.assert_close(derivative, expected)


@pytest.mark.parametrize("backend", ["aten", "flash"])
def test_backend_without_forward_mode_names_the_one_that_has_it(backend: str) -> None:
    q, k, v, ids = make_inputs()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match=rf"^selfattn: .*{backend}.*forward-mode.*reference"):
            selfattn.multihead_attention(dual, k, v, ids, backend=backend)


@pytest.mark.parametrize("backend", ["aten", "flash"])
def test_backend_without_function_transforms_names_the_one_that_has_them(backend: str) -> None:
    q, k, v, ids = make_inputs()

    def loss(q: torch.Tensor) -> torch.Tensor:
        return selfattn.multihead_attention(q, k, v, ids, backend=backend).sum()

    transformed = [
        torch.func.grad(loss),
        torch.vmap(torch.func.grad(loss)),
        torch.func.grad(lambda q: torch.vmap(loss)(q).sum()),
        lambda q: torch.func.jvp(loss, (q,), (q,)),
    ]
    for function, argument in zip(transformed, (q, q[None], q[None], q), strict=True):
        with pytest.raises(NotImplementedError, match=rf"^selfattn: .*{backend}.*torch.func transform.*reference"):
            function(argument)


def test_double_backward_through_the_reference() -> None:
    q, k, v, ids = make_inputs()
    leaf = q.double().requires_grad_()

    def penalty(leaf: torch.Tensor) -> torch.Tensor:
        out = selfattn.multihead_attention(leaf, k.double(), v.double(), ids, backend="reference")
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        return gradient.square().sum()

    (second,) = torch.autograd.grad(penalty(leaf), leaf)
    direction, step = torch.randn_like(leaf), 1e-6
    quotient = (penalty(leaf + step * direction) - penalty(leaf - step * direction)) / (2 * step)
    torch.testing.assert_close((second * direction).sum(), quotient.detach(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", ["flash", "auto"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 1.5}, {"window_left": 2, "causal": False}, {"sinks": torch.ones(4)}]
)
def test_double_backward_through_the_kernels_equals_the_reference(backend: str, options: dict) -> None:
    q, k, v, ids = make_inputs()
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]

    def second_derivatives(backend: str) -> list[torch.Tensor]:
        out = selfattn.multihead_attention(*leaves, ids, backend=backend, **options)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)

    for gradient, expected in zip(second_derivatives(backend), second_derivatives("reference"), strict=True):
        assert error(gradient, expected) < 1e-5


def test_per_example_gradients_of_the_module() -> None:
    module = selfattn.SelfAttention(32, selfattn.SelfAttentionConfig(head_dim=16))
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    x, ids = torch.randn(3, 5, 32), make_ids("shuffled", 3, 5)

    def loss(parameters: dict, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(module, parameters, (x[None], None, ids[None]))
        return out.square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, ids)
    module(x, segment_ids=ids).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-5)
