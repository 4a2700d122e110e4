"""A tensor that is not dense is refused by the name of its argument, with what to do, in every operator."""

import warnings

import pytest
import torch
from support.fuzz_operators import find_operator, good_tensors, operators
from torch import Tensor

import selfattn  # noqa: F401 - loads the operators

OPERATORS = operators()
REQUIRED = {"length": 7, "max_segments": 7, "feat_dim": 8, "rotary_dim": 8, "head_dim": 8, "grad_lse": None}
REQUIRED |= {"segment_ids": None, "num_queries": 7, "num_tokens": 7, "capacity": 16, "pages": 4}
REQUIRED |= {"group_rank": 0, "group_size": 2, "group_name": "", "shared": 0, "exchanged": []}
RESERVED = ("k_scale", "v_scale")
"""Refused whatever they are."""


def jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.jagged)


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)])


KINDS = {
    "jagged": (jagged, "nested.*segment_ids_from_cu_seqlens"),
    "nested": (nested, "nested.*segment_ids_from_cu_seqlens"),
    "sparse_coo": (lambda: torch.eye(4).to_sparse(), r"Sparse.*to_dense\(\)"),
    "sparse_csr": (lambda: torch.eye(4).to_sparse_csr(), r"SparseCsr.*to_dense\(\)"),
    "mkldnn": (lambda: torch.randn(2, 3, 4).to_mkldnn(), r"Mkldnn.*to_dense\(\)"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8), r"QInt8.*dequantize\(\)"),
    "complex": (lambda: torch.randn(2, 7, 4, 8, dtype=torch.complex64), "ComplexFloat"),
}


def arguments_with(name: str, bad_name: str, bad: Tensor) -> dict:
    """Good arguments but for one, without those that may be left out."""
    tensors = good_tensors(name, torch.float32)
    arguments = {}
    for argument in OPERATORS[name].arguments:
        if argument.name == bad_name:
            arguments[argument.name] = bad
        elif argument.name in tensors and not isinstance(argument.type, torch.OptionalType):
            arguments[argument.name] = tensors[argument.name]
        elif argument.name in REQUIRED and not argument.has_default_value():
            arguments[argument.name] = REQUIRED[argument.name]
    if name.startswith("qk_norm_rope_backward"):
        arguments = {"q": tensors["q"], "k": tensors["k"]} | arguments
    for one, other in (("freqs_sin", "freqs_cos"), ("q_norm_weight", "k_norm_weight"), ("segment_ids",) * 2):
        for given, missing in ((one, other), (other, one)):
            if bad_name == given:
                arguments.setdefault(missing, tensors[missing])
    if "k_cache" in arguments or bad_name == "k_cache":  # more pages than rows
        arguments.setdefault("page_table", tensors["page_table"])
    for of_keys, of_queries in (("kv_segment_ids", "segment_ids"), ("kv_positions", "positions")):
        if bad_name == of_keys:
            arguments.setdefault(of_queries, tensors[of_queries])
    return arguments


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_tensor_that_is_not_dense_is_named(name: str, kind: str) -> None:
    make, detail = KINDS[kind]
    arguments = [argument for argument in OPERATORS[name].arguments if "List" not in str(argument.type)]
    tensor_arguments = [a.name for a in arguments if "Tensor" in str(a.type) and a.name not in RESERVED]
    for bad in tensor_arguments:
        for mode in (torch.enable_grad(), torch.inference_mode()):
            with warnings.catch_warnings(), mode:
                warnings.simplefilter("ignore")
                arguments = arguments_with(name, bad, make())
                with pytest.raises(TypeError, match=rf"^selfattn: {bad} must .*{detail}"):
                    find_operator(name)(**arguments)
