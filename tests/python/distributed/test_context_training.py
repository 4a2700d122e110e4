"""Promise: a layer and a model whose rows are spread over ranks are those of one process, weights' gradients included,
beside every other axis."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.problems import error
from support.ranks import Ranks
from support.small_model import (
    data_rank,
    loss_in_context,
    loss_of,
    make_model,
    make_optimizer,
    train_alone,
    whole,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import selfattn
from selfattn import ParallelConfig, SelfAttention, SelfAttentionConfig
from selfattn.distributed import ContextLayout, TensorParallel, parallelize

WIDTH, LENGTH = 32, 14
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms and sinks": {"qk_norm": True, "sinks": True, "num_kv_heads": 2, "use_bias": True},
    "norm of projections": {"qk_norm": True, "qk_norm_scope": "projection", "window_left": 3, "rope_pairing": "half"},
    "long rotation": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4}},
    "no rotation": {"rope": False, "causal": False, "softcap": 2.0, "qk_scale": 0.3},
    "hook": {},
}


def check_layers(tensor_parallel: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 1 + tensor_parallel), mesh_dim_names=("cp", "tp"))
    ids = torch.tensor([[0] * 6 + [1] * 5 + [2, -1, -1], [3] * LENGTH], dtype=torch.int64)
    x, grad = torch.randn(2, LENGTH, WIDTH), torch.randn(2, LENGTH, WIDTH)
    layout = ContextLayout.from_segment_ids(ids, mesh["cp"], bucket=4)
    freqs = selfattn.precompute_freqs(8, torch.tensor([[*range(6), *range(5), 0, 0, 0], [*range(LENGTH)]]))
    for name, options in LAYERS.items():
        if name == "hook" and tensor_parallel:
            continue
        torch.manual_seed(1)
        alone = SelfAttention(WIDTH, SelfAttentionConfig(head_dim=8, **options))
        by_keys = ParallelConfig(context_method="keys")
        spread = SelfAttention(WIDTH, SelfAttentionConfig(head_dim=8, **options, parallel=by_keys))
        spread.load_state_dict(alone.state_dict())
        if name == "hook":
            for layer in (alone, spread):
                layer.q_proj.register_forward_hook(lambda _, inputs, out: out * 2)
        if tensor_parallel:
            parallelize_module(spread, mesh["tp"], TensorParallel())
        own_freqs = layout.freqs(8) if name == "plain" else None
        expected = alone(x, freqs if name == "plain" else None, ids)
        out = spread(layout.shard(x), own_freqs, layout.segment_ids, context=layout)
        expected.backward(grad)
        out.backward(layout.shard(grad))
        has_token = (layout.indices >= 0).unsqueeze(2)
        assert error(out * has_token, layout.shard(expected)) < 2e-5, name
        for (label, parameter), reference in zip(spread.named_parameters(), alone.parameters(), strict=True):
            total = whole(parameter.grad)
            dist.all_reduce(total, group=mesh.get_group("cp"))
            assert error(total, reference.grad) < 5e-5, (name, label)


@pytest.mark.parametrize("tensor_parallel", [False, True])
def test_layer(ranks: Ranks, tensor_parallel: bool) -> None:
    ranks.run(check_layers, 4 if tensor_parallel else 2, tensor_parallel)


FSDP = {"fsdp_modules": ["Block"], "fsdp_min_weight_size": 0}
SMALL_WHOLE = {"fsdp_modules": ["Block"], "fsdp_min_weight_size": 100}


def spread_model(fields: dict[str, Any]) -> tuple[nn.Module, DeviceMesh, ParallelConfig, int, int]:
    """The model, which batch this rank shares, and of how many."""
    config = ParallelConfig(**fields)
    mesh = config.device_mesh("cpu")
    model = parallelize(make_model(config), mesh, config)
    return model, mesh, config, data_rank(mesh, config), mesh["dp"].size() * mesh["fsdp"].size()


def check_training(fields: dict[str, Any]) -> None:
    model, mesh, config, rank, batches = spread_model(fields)
    optimizer = make_optimizer(model)
    for step in range(3):
        optimizer.zero_grad()
        loss_in_context(model, step * batches + rank, mesh, config).backward()
        optimizer.step()
    alone = train_alone(batches, range(3)).state_dict()
    for name, parameter in get_model_state_dict(model).items():
        assert error(whole(parameter), alone[name]) < 1e-9, name


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        (2, {"context_axis_size": 2}),
        (2, {"context_axis_size": 2, "context_balance": "head_tail", "context_method": "heads", **SMALL_WHOLE}),
        (4, {"context_axis_size": 2}),
        (4, {"context_axis_size": 2, "fsdp_axis_size": 2, **FSDP}),
        (4, {"context_axis_size": 2, "fsdp_axis_size": 2, "remat": ["SelfAttention"], **SMALL_WHOLE}),
        (4, {"context_axis_size": 2, "model_axis_size": 2, "context_balance": "contiguous", **SMALL_WHOLE}),
        (4, {"context_axis_size": 4, "remat": ["Block"], **FSDP}),
        (4, {"context_axis_size": 4, "context_heads_size": 2, **SMALL_WHOLE}),
    ],
    ids=str,
)
def test_training(ranks: Ranks, size: int, fields: dict[str, Any]) -> None:
    ranks.run(check_training, size, fields)


def check_accumulation() -> None:
    fields = {"context_axis_size": 2, "fsdp_axis_size": 2, **SMALL_WHOLE}
    model, mesh, config, rank, batches = spread_model(fields)
    alone = make_model()
    for step in range(2):
        loss_in_context(model, step * batches + rank, mesh, config).backward()
        (sum(loss_of(alone, step * batches + number) for number in range(batches)) / batches).backward()
    for (name, parameter), reference in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert error(whole(parameter.grad), reference.grad) < 1e-9, name


def test_gradients_of_several_passes_add_up(ranks: Ranks) -> None:
    ranks.run(check_accumulation, 4)


def check_refusals() -> None:
    config = ParallelConfig(context_axis_size=2)
    mesh = config.device_mesh("cpu")
    model = parallelize(make_model(config), mesh, config)
    layer = model.blocks[0].attn
    x = torch.zeros(1, 4, WIDTH, dtype=torch.float64)
    layout = config.context_layout(torch.zeros(1, 8, dtype=torch.int32), mesh)
    assert layout.balance == config.context_balance
    with pytest.raises(
        ValueError, match=r"context: expected a ContextLayout in a layer .*context_axis_size 2\), got None"
    ):
        layer(x)
    with pytest.raises(TypeError, match="context: expected a ContextLayout, got int"):
        layer(x, context=2)
    with pytest.raises(ValueError, match=r"segment_ids: expected None or the context's own .*another of .*\(1, 4\)"):
        layer(x, segment_ids=layout.segment_ids.clone(), context=layout)
    plain = SelfAttention(WIDTH, SelfAttentionConfig(head_dim=8))
    cache = selfattn.KVCache.dense(1, 1, 16, num_kv_heads=4, head_dim=8, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="cache: expected None beside a context"):
        plain(x.float(), cache=cache.layer(0), context=layout)
    with pytest.raises(torch.jit.Error, match="context: expected None in TorchScript"):
        torch.jit.script(plain)(x.float(), context=1)
    with pytest.raises(ValueError, match="model: expected a SelfAttention for the context axis of 2 ranks, got none"):
        parallelize(nn.Linear(2, 2), mesh, config)
    plan = {f"{name}_proj": ColwiseParallel() for name in "qkv"}
    columns = parallelize_module(plain, init_device_mesh("cpu", (2,)), plan)
    with pytest.raises(NotImplementedError, match="spread by ColwiseParallel and RowwiseParallel"):
        columns(x.float(), context=layout)


def test_refusals(ranks: Ranks) -> None:
    ranks.run(check_refusals, 2)
