"""PyTorch's own gradcheck, in float64, through the operators: first and second derivatives."""

import pytest
import torch
from support.cases import CASES
from support.problems import Case

import selfattn

SMALL = [
    case.with_(
        batch=1,
        num_queries=(case.num_queries + 1) // 2,
        num_keys=(case.num_keys + 1) // 2,
        num_heads=2,
        num_kv_heads=min(case.num_kv_heads, 2),
        dim=2,
        value_dim=1,
    )
    for case in CASES
    if case.num_queries <= 14
]


def make_function(case: Case):
    tensors = case.tensors(torch.float64)
    names = [name for name in ("q", "k", "v", "sinks") if name in tensors]
    fixed = {name: tensor for name, tensor in tensors.items() if name not in names}

    def function(*leaves: torch.Tensor):
        call = {**fixed, **dict(zip(names, leaves, strict=True)), **case.options, "backend": "reference"}
        return selfattn.multihead_attention(**call)

    return function, tuple(tensors[name].requires_grad_() for name in names)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_first_derivatives(case: Case) -> None:
    function, leaves = make_function(case)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)


@pytest.mark.parametrize(
    "name", ["ids_shuffled", "ids_mixed_padding", "softcap", "sinks", "positions_any", "everything"]
)
def test_second_derivatives(name: str) -> None:
    case = next(case for case in SMALL if case.name == name).with_(num_queries=4, num_keys=5, has_kv_ids=True)
    function, leaves = make_function(case)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_derivative_of_lse() -> None:
    # lse is float32: the step of the check is chosen for it.
    q, k = (torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ids = torch.tensor([[0, 0, 1, 0]])

    def function(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return selfattn.multihead_attention_lse(q, k, k.detach(), ids, backend="reference")[1]

    assert torch.autograd.gradcheck(function, (q, k), eps=1e-2, atol=1e-3, rtol=1e-3)


def test_module_in_float64() -> None:
    config = selfattn.SelfAttentionConfig(head_dim=4, qk_norm=True, use_bias=True, sinks=True, softcap=2.0)
    module = selfattn.SelfAttention(8, config, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 1, -1, 1]])
    names = [name for name, _ in module.named_parameters()]

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, weights, (x, None, ids))

    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *module.parameters()))
