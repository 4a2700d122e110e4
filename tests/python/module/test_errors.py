"""A module that cannot be is refused when it is made, and a bad input by the argument's name."""

import pytest
import torch

from selfattn import ParallelConfig, SelfAttention, SelfAttentionConfig

X = torch.zeros(2, 6, 128)
SIN = COS = torch.zeros(1, 6, 32)


def test_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="embedding_dim: expected a positive multiple of head_dim 64, got 100"):
        SelfAttention(100)


@pytest.mark.parametrize("width", [0, -1])
def test_width_must_be_positive_where_heads_are_given(width: int) -> None:
    with pytest.raises(ValueError, match=f"embedding_dim: expected a positive number, got {width}"):
        SelfAttention(width, SelfAttentionConfig(num_heads=2))


def test_kv_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_kv_heads: expected a divisor of the 2 query heads .*, got 3"):
        SelfAttention(128, SelfAttentionConfig(num_kv_heads=3))


def test_tables_for_a_layer_that_does_not_rotate_are_refused() -> None:
    layer = SelfAttention(128, SelfAttentionConfig(rope=False))
    with pytest.raises(ValueError, match="freqs_sin, freqs_cos and positions must not be given where rope is False"):
        layer(X, (SIN, COS))


def test_config_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="config: expected a SelfAttentionConfig, got dict"):
        SelfAttention(128, {"head_dim": 64})


@pytest.mark.parametrize(
    "field",
    [
        {"data_axis_size": 2},
        {"fsdp_axis_size": 2},
        {"pipeline_axis_size": 2},
        {"model_axis_size": 2},
        {"context_axis_size": 2},
        {"remat": ["Block", "SelfAttention"]},
        {"fsdp_modules": ["Block", "SelfAttention"]},
        {"fsdp_min_weight_size": 0},
        {"fsdp_gather_dtype": "bfloat16"},
        {"fsdp_grad_scatter_dtype": "float32"},
        {"tp_async_dense": True},
    ],
    ids=lambda field: next(iter(field)),
)
def test_layer_refuses_to_run_before_its_parallel_config_is_applied(field: dict) -> None:
    (name,) = field
    layer = SelfAttention(128, SelfAttentionConfig(parallel=ParallelConfig(**field)))
    expected = rf"config.parallel has {name} .*: expected selfattn.distributed.parallelize\(.*, got a layer on one"
    with pytest.raises(RuntimeError, match=expected):
        layer(X)
    with pytest.raises(NotImplementedError, match="TorchScript: expected a layer on one device"):
        torch.jit.script(layer)


def test_parallel_fields_for_other_modules_are_not_this_ones() -> None:
    names = {f"{axis}_axis_name": axis for axis in ("data", "fsdp", "pipeline", "model", "context")}
    parallel = ParallelConfig(fsdp_modules=["Block"], remat=["Block"], **names)
    SelfAttention(128, SelfAttentionConfig(parallel=parallel))(X)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((X[0],), ValueError, "x"),
        ((torch.zeros(2, 6, 64),), ValueError, "x"),
        ((X.long(),), TypeError, "x"),
        ((X, (SIN[:, :5], COS)), ValueError, "freqs_sin"),
        ((X, (SIN, COS[..., :5])), ValueError, "freqs_cos"),
        ((X, (SIN.expand(3, 6, 32), COS)), ValueError, "freqs_sin"),
        ((X, (SIN.long(), COS)), TypeError, "freqs_sin"),
        ((X, (SIN[0], COS)), ValueError, "freqs_sin"),
        ((X, None, torch.zeros(2, 5, dtype=torch.int32)), ValueError, "segment_ids"),
        ((X, None, torch.zeros(6, dtype=torch.int32)), ValueError, "segment_ids"),
        ((X, None, torch.zeros(2, 6)), TypeError, "segment_ids"),
    ],
)
def test_bad_input_is_named(arguments: tuple, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^selfattn: {name}\b"):
        SelfAttention(128)(*arguments)


def test_unknown_backend_is_named() -> None:
    module = SelfAttention(128)
    module.attention_backend = "fastest"
    with pytest.raises(ValueError, match=r"^selfattn: .*backend.*fastest"):
        module(X)
