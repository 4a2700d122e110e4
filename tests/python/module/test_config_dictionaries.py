"""A configuration survives the way through a dictionary and JSON, and unknown fields are named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfattn import AttentionBackend, ParallelConfig, SelfAttentionConfig

DEFAULTS = {
    "head_dim": 64,
    "qk_norm": False,
    "use_bias": False,
    "dropout_rate": 0.0,
    "num_layers": 12,
    "dtype": "float32",
    "attention_backend": "auto",
    "causal": True,
    "parallel": {
        "data_axis_name": "dp",
        "fsdp_axis_name": "fsdp",
        "pipeline_axis_name": "pp",
        "model_axis_name": "tp",
        "context_axis_name": "cp",
        "data_axis_size": -1,
        "fsdp_axis_size": 1,
        "pipeline_axis_size": 1,
        "model_axis_size": 1,
        "context_axis_size": 1,
        "context_heads_size": 1,
        "remat": [],
        "fsdp_modules": [],
        "fsdp_min_weight_size": 2**18,
        "fsdp_gather_dtype": None,
        "fsdp_grad_scatter_dtype": None,
        "tp_async_dense": False,
        "context_method": "auto",
        "context_balance": "documents",
    },
    "num_kv_heads": None,
    "window_left": -1,
    "window_right": -1,
    "softcap": 0.0,
    "sinks": False,
    "rope_theta": 10000.0,
    "rope_pairing": "interleaved",
    "norm_eps": 1e-6,
    "num_heads": None,
    "qk_scale": None,
    "qkv_bias": None,
    "out_bias": None,
    "norm_unit_offset": False,
    "qk_norm_scope": "head",
    "rope": True,
    "rotary_dim": None,
    "rope_scaling": None,
    "rope_length": None,
}

parallel_configs = st.builds(
    ParallelConfig,
    data_axis_size=st.sampled_from([-1, 1, 4]),
    model_axis_size=st.integers(1, 8),
    remat=st.lists(st.text(max_size=5), max_size=3),
    fsdp_modules=st.lists(st.text(max_size=5), max_size=3),
    fsdp_gather_dtype=st.sampled_from([None, "bfloat16"]),
    tp_async_dense=st.booleans(),
    context_method=st.sampled_from(["auto", "heads", "keys"]),
    context_balance=st.sampled_from(["documents", "head_tail", "contiguous"]),
)
configs = st.builds(
    SelfAttentionConfig,
    head_dim=st.integers(1, 128).map(lambda half: 2 * half),
    qk_norm=st.booleans(),
    dropout_rate=st.floats(0, 0.99),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    attention_backend=st.sampled_from(AttentionBackend.names()),
    num_kv_heads=st.none() | st.integers(1, 8),
    window_left=st.integers(-1, 10),
    rope_theta=st.floats(1.0, 1e7),
    parallel=parallel_configs,
    qk_scale=st.none() | st.floats(-2.0, 2.0),
    qkv_bias=st.none() | st.booleans(),
    out_bias=st.none() | st.booleans(),
)


def test_defaults_are_these() -> None:
    assert SelfAttentionConfig().to_dict() == DEFAULTS


@given(configs)
def test_json_round_trip_gives_an_equal_configuration(config: SelfAttentionConfig) -> None:
    assert SelfAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_absent_fields_take_their_defaults() -> None:
    assert SelfAttentionConfig.from_dict({"head_dim": 32}) == SelfAttentionConfig(head_dim=32)


@pytest.mark.parametrize("config", [SelfAttentionConfig, ParallelConfig])
def test_unknown_field_is_named(config: type) -> None:
    with pytest.raises(ValueError, match=rf"{config.__name__}: unknown field 'heads'; expected fields out of .+"):
        config.from_dict({"heads": 4})


def test_unknown_field_of_the_nested_configuration_is_named() -> None:
    with pytest.raises(ValueError, match="ParallelConfig: unknown fields 'a', 'b'"):
        SelfAttentionConfig.from_dict({"parallel": {"a": 1, "b": 2}})


def test_other_than_a_mapping_is_refused() -> None:
    with pytest.raises(TypeError, match=r"SelfAttentionConfig.from_dict: expected a mapping, got list"):
        SelfAttentionConfig.from_dict([("head_dim", 64)])
