"""A new module has the documented shapes, dtype, and distribution of its weights."""

import math

import pytest
import torch

from selfattn import SelfAttention, SelfAttentionConfig

E = 512


def test_projections_have_their_standard_deviations() -> None:
    module = SelfAttention(E, SelfAttentionConfig(num_layers=3))
    for projection in (module.q_proj, module.k_proj, module.v_proj):
        assert projection.weight.std().item() == pytest.approx(math.sqrt(2 / (5 * E)), rel=0.01)
        assert projection.weight.mean().abs().item() < 1e-3
    assert module.out_proj.weight.std().item() == pytest.approx(2 / (2 * 3) / math.sqrt(E), rel=0.01)


def test_biases_are_zero_and_norms_one() -> None:
    module = SelfAttention(E, SelfAttentionConfig(use_bias=True, qk_norm=True, sinks=True))
    for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
        assert (projection.bias == 0).all()
    assert (module.q_norm.weight == 1).all() and (module.k_norm.weight == 1).all()
    assert (module.sinks == 0).all()


def test_parameters_have_the_documented_names_and_shapes() -> None:
    config = SelfAttentionConfig(head_dim=64, num_kv_heads=2, use_bias=True, qk_norm=True, sinks=True)
    shapes = {name: tuple(parameter.shape) for name, parameter in SelfAttention(E, config).named_parameters()}
    assert shapes == {
        "q_proj.weight": (512, 512),
        "q_proj.bias": (512,),
        "k_proj.weight": (128, 512),
        "k_proj.bias": (128,),
        "v_proj.weight": (128, 512),
        "v_proj.bias": (128,),
        "out_proj.weight": (512, 512),
        "out_proj.bias": (512,),
        "q_norm.weight": (64,),
        "k_norm.weight": (64,),
        "sinks": (8,),
    }


def test_plain_module_has_four_weights_only() -> None:
    assert [name for name, _ in SelfAttention(E).named_parameters()] == [
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "out_proj.weight",
    ]


def test_dtype_comes_from_the_config_unless_given() -> None:
    config = SelfAttentionConfig(dtype="bfloat16", qk_norm=True, sinks=True)
    assert {parameter.dtype for parameter in SelfAttention(E, config).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in SelfAttention(E, config, dtype=torch.float64).parameters()} == {torch.float64}


def test_meta_device_holds_no_memory() -> None:
    module = SelfAttention(E, device="meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module(torch.empty(2, 5, E, device="meta")).shape == (2, 5, E)


def test_reset_parameters_draws_anew() -> None:
    module = SelfAttention(E)
    before = module.q_proj.weight.clone()
    module.reset_parameters()
    assert not torch.equal(module.q_proj.weight, before)


def test_printed_module_says_what_it_is() -> None:
    config = SelfAttentionConfig(head_dim=64, num_kv_heads=2, window_left=128, attention_backend="reference")
    text = repr(SelfAttention(E, config))
    for part in ("512, num_heads=8, head_dim=64", "num_kv_heads=2", "window_left=128", "backend=reference"):
        assert part in text
