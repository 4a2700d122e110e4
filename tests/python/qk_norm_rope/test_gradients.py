"""All gradients of qk_norm_rope are those of float64, within twice the error of the formula's own precision."""

import itertools

import pytest
import torch
from support.norm_rope import CASES, NormRopeCase, expected, in_own_precision
from support.problems import norm_error
from torch import Tensor

import selfattn

FLOOR = 1e-6
LEAVES = ("q", "k", "q_weight", "k_weight")


def leaves_of(arguments: dict) -> dict[str, Tensor]:
    return {name: arguments[name] for name in LEAVES if name in arguments}


def gradients(function, arguments: dict, tables, grads: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Of a call whose leaves are detached from those in ``arguments``, in their layouts."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves_of(arguments).items()}
    results = function(arguments | leaves, tables)
    found = torch.autograd.grad(
        results, list(leaves.values()), [g.to(r.device, r.dtype) for g, r in zip(grads, results, strict=True)]
    )
    return dict(zip(leaves, found, strict=True))


def exact(arguments: dict, tables):
    doubled = {name: value.cpu().double() if name in LEAVES else value for name, value in arguments.items()}
    return doubled, tables


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_float64(case: NormRopeCase, device: str) -> None:
    arguments, tables = case.make(device)
    grads = tuple(torch.randn(arguments[name].shape).to(device, case.dtype) for name in ("q", "k"))
    actual = gradients(lambda given, _: selfattn.qk_norm_rope(**given), arguments, tables, grads)
    peers = gradients(in_own_precision, arguments, tables, grads)
    doubled, _ = exact(arguments, tables)
    wanted = gradients(expected, doubled, tables, grads)
    for name, gradient in actual.items():
        assert gradient.dtype == arguments[name].dtype
        assert norm_error(gradient, wanted[name]) <= 2 * norm_error(peers[name], wanted[name]) + FLOOR, name


@pytest.mark.parametrize("dim", [64, 40])
def test_gradient_of_one_result_alone(dim: int, device: str) -> None:
    case = NormRopeCase(dim=dim)
    arguments, tables = case.make(device)
    grads = (torch.randn(arguments["q"].shape), torch.zeros(arguments["k"].shape))
    wanted = gradients(lambda given, _: selfattn.qk_norm_rope(**given), arguments, tables, grads)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves_of(arguments).items()}
    q, _ = selfattn.qk_norm_rope(**(arguments | leaves))
    q.backward(grads[0].to(device))
    for name, leaf in leaves.items():
        found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert torch.equal(found, wanted[name])


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dim", [128, 24])
def test_incoming_gradients_of_any_strides(norm: bool, dim: int, device: str) -> None:
    case = NormRopeCase(dtype=torch.bfloat16, dim=dim, norm=norm, weights=None, source="positions")
    arguments, _ = case.make(device)
    leaves = {name: arguments[name].requires_grad_() for name in ("q", "k")}
    results = selfattn.qk_norm_rope(**arguments)
    (results[0].sum() + results[1].sum()).backward()  # gradients that are one element, expanded
    by_sum = [leaf.grad.clone() for leaf in leaves.values()]
    found = torch.autograd.grad(
        selfattn.qk_norm_rope(**arguments),
        list(leaves.values()),
        [torch.ones_like(result) for result in results],
    )
    assert all(torch.equal(a, b) for a, b in zip(by_sum, found, strict=True))
    heads_first = [torch.randn(2, leaf.shape[2], 7, dim).to(device, torch.bfloat16) for leaf in leaves.values()]
    transposed = [grad.transpose(1, 2) for grad in heads_first]
    found, wanted = (
        torch.autograd.grad(selfattn.qk_norm_rope(**arguments), list(leaves.values()), grads)
        for grads in (transposed, [grad.contiguous() for grad in transposed])
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dim", [64, 96, 24])
def test_padding_lanes_do_not_reach_the_weights(dim: int, device: str) -> None:
    """eps 0 makes 0 / 0 of every head that is not there."""
    q, k = (torch.randn(1, 5, heads, dim, device=device) for heads in (3, 1))
    weight = torch.ones(dim, device=device, requires_grad=True)
    results = selfattn.qk_norm_rope(q, k, weight, weight, eps=0.0)
    sum(result.square().sum() for result in results).backward()
    assert weight.grad.isfinite().all() and (weight.grad != 0).any()


def test_only_the_raw_inputs_are_saved(device: str) -> None:
    q, k = (torch.randn(2, 5, heads, 32, device=device, requires_grad=True) for heads in (4, 2))
    weight = torch.ones(32, device=device, requires_grad=True)
    sin, cos = (table.to(device) for table in selfattn.precompute_freqs(32, max_length=5))

    def saved_by(**options) -> list[Tensor]:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
            selfattn.qk_norm_rope(q, k, **options)
        return saved

    with_norm = {tensor.data_ptr() for tensor in saved_by(q_weight=weight, k_weight=weight)}
    assert with_norm == {q.data_ptr(), k.data_ptr(), weight.data_ptr()}
    assert {t.data_ptr() for t in saved_by(norm=False, freqs_sin=sin, freqs_cos=cos)} == {
        sin.data_ptr(),
        cos.data_ptr(),
    }


@pytest.mark.parametrize("qk_norm", [False, True])
def test_in_place_gradient_of_qk_norm_rope_is_the_same(qk_norm: bool, device: str) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for dtype, dim in ((dtype, dim) for dtype in dtypes for dim in (48, 64, 128, 24)):
        q, k, dq, dk = (torch.randn(2, 9, n, dim, device=device).to(dtype) for n in (4, 2, 4, 2))
        heads = (q, k, *(torch.rand(dim, device=device) for _ in range(2))) if qk_norm else (None,) * 4
        sin, cos = (table.to(device) for table in selfattn.precompute_freqs(16, max_length=9))
        for pairing, freqs in itertools.product(("interleaved", "half"), ({}, {"freqs_sin": sin, "freqs_cos": cos})):
            options = {"norm": qk_norm, "pairing": pairing, **freqs}
            wanted = torch.ops.selfattn.qk_norm_rope_backward(dq, dk, *heads, **options)
            found = dq.clone(), dk.clone()
            weights = torch.ops.selfattn.qk_norm_rope_backward.in_place(*found, *heads, **options)
            assert all(torch.equal(a, b) for a, b in zip((*found, *weights), wanted, strict=True)), (dtype, dim)
