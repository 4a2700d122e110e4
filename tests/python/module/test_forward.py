"""The module computes the written-out layer: projections, norm, rotary step, attention, output projection."""

import pytest
import torch
from support import reference
from support.problems import error, make_ids

from selfattn import SelfAttention, SelfAttentionConfig, precompute_freqs

E, HEAD_DIM = 48, 8
CONFIGS = {
    "plain": {},
    "norm": {"qk_norm": True, "norm_eps": 1e-3},
    "bias": {"use_bias": True},
    "grouped": {"num_kv_heads": 2},
    "window": {"window_left": 3, "window_right": 1, "causal": False},
    "softcap": {"softcap": 0.5},
    "sinks": {"sinks": True},
    "heads_of_another_width": {"num_heads": 5, "num_kv_heads": 1, "qk_norm": True},
    "scale": {"qk_scale": 0.8},
    "no_rotation": {"rope": False},
    "norm_without_rotation": {"rope": False, "qk_norm": True, "num_kv_heads": 2},
    "norm_around_one": {"qk_norm": True, "norm_unit_offset": True},
    "norm_of_projections": {"qk_norm": True, "qk_norm_scope": "projection", "num_kv_heads": 2},
    "norm_of_projections_around_one": {"qk_norm": True, "qk_norm_scope": "projection", "norm_unit_offset": True},
    "bias_of_heads": {"qkv_bias": True},
    "all_biases_but_one": {"use_bias": True, "out_bias": False},
    "half": {"rope_pairing": "half", "rope_theta": 500.0},
    "everything": {
        "qk_norm": True,
        "use_bias": True,
        "num_kv_heads": 3,
        "window_left": 4,
        "softcap": 1.0,
        "sinks": True,
        "rope_pairing": "half",
    },
}
ATTENTION_OPTIONS = ("causal", "qk_scale", "window_left", "window_right", "softcap")


def make_module(options: dict, dtype: torch.dtype = torch.float64) -> SelfAttention:
    module = SelfAttention(E, SelfAttentionConfig(head_dim=HEAD_DIM, **options), dtype=dtype)
    with torch.no_grad():  # biases, norms and sinks that a wrong formula would show
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.1)
    return module


def expected_output(module: SelfAttention, options: dict, x: torch.Tensor, **inputs) -> torch.Tensor:
    names = {
        name: options[name]
        for name in (*ATTENTION_OPTIONS, "rope", "rope_theta", "rope_pairing", "norm_eps")
        if name in options
    }
    parameters = dict(module.named_parameters())
    if options.get("norm_unit_offset"):
        parameters |= {name: 1 + parameters[name] for name in ("q_norm.weight", "k_norm.weight")}
    return reference.self_attention(x, parameters, HEAD_DIM, **inputs, **names)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward_and_gradients_equal_the_oracle(options: dict, dtype: torch.dtype) -> None:
    module = make_module(options, dtype)
    x = torch.randn(2, 11, E, dtype=dtype, requires_grad=True)
    ids = make_ids("shuffled", 2, 11)
    inputs = [x, *module.parameters()]
    out = module(x, segment_ids=ids)
    expected = expected_output(module, options, x, segment_ids=ids)
    assert out.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float64 else 2e-5
    assert error(out, expected) < tolerance
    grad_out = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, grad_out)
    for gradient, oracle in zip(gradients, torch.autograd.grad(expected, inputs, grad_out.double()), strict=True):
        assert error(gradient, oracle) < tolerance


def test_parameters_have_the_stated_shapes() -> None:
    config = SelfAttentionConfig(head_dim=HEAD_DIM, num_heads=6, num_kv_heads=2, qkv_bias=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in SelfAttention(20, config).named_parameters()}
    assert shapes == {
        "q_proj.weight": (48, 20),
        "q_proj.bias": (48,),
        "k_proj.weight": (16, 20),
        "k_proj.bias": (16,),
        "v_proj.weight": (16, 20),
        "v_proj.bias": (16,),
        "out_proj.weight": (20, 48),
    }


def test_positions_of_documents_are_taken_from_the_frequencies() -> None:
    module = make_module({})
    x = torch.randn(2, 9, E, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [5, 6, 7, 8, 0, 1, 2, 3, 4]])
    out = module(x, precompute_freqs(HEAD_DIM, positions))
    assert error(out, expected_output(module, {}, x, positions=positions)) < 1e-6
    assert error(out, expected_output(module, {}, x)) > 1e-3  # the positions matter


def test_packed_documents_equal_documents_alone() -> None:
    module = make_module({"qk_norm": True})
    lengths = [1, 5, 3]
    documents = [torch.randn(1, length, E, dtype=torch.float64) for length in lengths]
    ids = torch.tensor([[0] * 1 + [1] * 5 + [2] * 3])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = module(torch.cat(documents, dim=1), precompute_freqs(HEAD_DIM, positions, dtype=torch.float64), ids)
    assert error(packed, torch.cat([module(document) for document in documents], dim=1)) < 1e-12


def test_no_frequencies_are_positions_from_zero() -> None:
    module = make_module({})
    x = torch.randn(2, 9, E, dtype=torch.float64)
    assert error(module(x), module(x, precompute_freqs(HEAD_DIM, None, 9, dtype=torch.float64))) < 1e-12
