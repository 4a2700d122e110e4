"""A configuration with a bad value cannot be made; the error names the field, what was expected and what came."""

import re

import pytest
import torch

from selfattn import AttentionBackend, ParallelConfig, SelfAttentionConfig

BAD_VALUES = [
    ("head_dim", 0, ValueError),
    ("head_dim", 63, ValueError),
    ("head_dim", 64.0, TypeError),
    ("head_dim", True, TypeError),
    ("qk_norm", 1, TypeError),
    ("use_bias", "no", TypeError),
    ("causal", None, TypeError),
    ("sinks", 0, TypeError),
    ("dropout_rate", -0.1, ValueError),
    ("dropout_rate", 1.0, ValueError),
    ("dropout_rate", float("nan"), ValueError),
    ("dropout_rate", "0.1", TypeError),
    ("num_layers", 0, ValueError),
    ("num_layers", 1.5, TypeError),
    ("dtype", "float8", ValueError),
    ("dtype", torch.float32, TypeError),
    ("attention_backend", "fastest", ValueError),
    ("attention_backend", None, TypeError),
    ("num_kv_heads", 0, ValueError),
    ("num_kv_heads", 2.0, TypeError),
    ("window_left", -2, ValueError),
    ("window_right", "8", TypeError),
    ("softcap", -1.0, ValueError),
    ("softcap", float("inf"), ValueError),
    ("rope_theta", 0.0, ValueError),
    ("rope_pairing", "pairs", ValueError),
    ("norm_eps", -1e-6, ValueError),
    ("parallel", 4, TypeError),
    ("norm_unit_offset", True, ValueError),
    ("norm_unit_offset", 1, TypeError),
    ("qk_norm_scope", "projection", ValueError),
    ("qk_norm_scope", "row", ValueError),
    ("qk_norm_scope", None, TypeError),
    ("rope", None, TypeError),
    ("num_heads", 0, ValueError),
    ("num_heads", 4.0, TypeError),
    ("qk_scale", float("inf"), ValueError),
    ("qk_scale", "1", TypeError),
    ("qkv_bias", 1, TypeError),
    ("out_bias", "yes", TypeError),
]

BAD_PARALLEL_VALUES = [
    ("data_axis_size", 0, ValueError),
    ("fsdp_axis_size", -2, ValueError),
    ("model_axis_size", 2.0, TypeError),
    ("context_axis_size", 0, ValueError),
    ("data_axis_name", "", ValueError),
    ("model_axis_name", 3, TypeError),
    ("remat", "SelfAttention", TypeError),
    ("fsdp_modules", [1], TypeError),
    ("fsdp_min_weight_size", -1, ValueError),
    ("fsdp_gather_dtype", "int8", ValueError),
    ("fsdp_grad_scatter_dtype", torch.bfloat16, TypeError),
    ("tp_async_dense", 1, TypeError),
    ("context_heads_size", 0, ValueError),
    ("context_heads_size", 2, ValueError),
    ("context_heads_size", "2", TypeError),
    ("context_method", "ring", ValueError),
    ("context_balance", None, TypeError),
]


@pytest.mark.parametrize(
    ("config", "field", "value", "error"),
    [(SelfAttentionConfig, *bad) for bad in BAD_VALUES] + [(ParallelConfig, *bad) for bad in BAD_PARALLEL_VALUES],
)
def test_bad_value_is_named(config: type, field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"{config.__name__}\.{field}: expected .+, got {re.escape(repr(value))}"):
        config(**{field: value})


def test_heads_that_do_not_share_keys_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_heads: expected a multiple of num_kv_heads 3, got 4"):
        SelfAttentionConfig(num_heads=4, num_kv_heads=3)


def test_two_axes_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="axis_name: expected a name that no other axis has, got 'dp'"):
        ParallelConfig(model_axis_name="dp")


def test_heads_are_exchanged_in_groups_of_the_context_axis_and_once() -> None:
    with pytest.raises(ValueError, match="context_heads_size: expected a divisor of context_axis_size 4, got 3"):
        ParallelConfig(context_axis_size=4, context_heads_size=3)
    with pytest.raises(ValueError, match=r"context_method: expected 'auto' or 'keys' beside .*, got 'heads'"):
        ParallelConfig(context_axis_size=4, context_heads_size=2, context_method="heads")
    with pytest.raises(ValueError, match="context_axis_name: expected a name that no other axis has, got 'c'"):
        ParallelConfig(context_axis_size=4, context_heads_size=2, context_axis_name="c", model_axis_name="c_heads")


def test_two_axes_that_take_all_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="fsdp_axis_size: expected at most one axis of size -1"):
        ParallelConfig(fsdp_axis_size=-1)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_dtype_is_torch_dtype(name: str) -> None:
    assert SelfAttentionConfig(dtype=name)._dtype is getattr(torch, name)


def test_backend_alias_is_the_backend() -> None:
    assert AttentionBackend("xla") is AttentionBackend.ATEN
    assert AttentionBackend("pallas_triton") is AttentionBackend("triton") is AttentionBackend.FLASH
    assert AttentionBackend("cudnn") is AttentionBackend.CUDNN
    with pytest.raises(ValueError, match="fastest"):
        AttentionBackend("fastest")


@pytest.mark.parametrize("name", AttentionBackend.names())
def test_every_backend_name_is_a_valid_field(name: str) -> None:
    assert SelfAttentionConfig(attention_backend=name).attention_backend == name


def test_field_cannot_be_changed_past_the_validation() -> None:
    with pytest.raises(AttributeError):
        SelfAttentionConfig().head_dim = -1


def test_name_of_an_earlier_version_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match="use request_to"):
        ParallelConfig().require_single_device("SelfAttention")
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(NotImplementedError, match="model_axis_size 2"),
    ):
        ParallelConfig(model_axis_size=2).require_single_device("SelfAttention")
