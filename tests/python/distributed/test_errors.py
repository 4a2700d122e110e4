"""Promise: what cannot be spread over ranks, and ranks that disagree, raise an error on every rank that names what was
expected and what came; a rank that dies ends in an error, too."""

import os
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import Ranks
from support.small_model import loss_of, make_batch, make_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import selfattn
from selfattn import ParallelConfig, SelfAttention, SelfAttentionConfig
from selfattn.distributed import TensorParallel, parallelize

X = torch.zeros(2, 8, 32)


def make_layer(**options: Any) -> SelfAttention:
    return SelfAttention(32, SelfAttentionConfig(**{"head_dim": 8, **options}))


def with_hook(name: str) -> SelfAttention:
    layer = make_layer(qk_norm=True)
    layer.get_submodule(name).register_forward_hook(lambda *_: None)
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "another module": (lambda: nn.Linear(2, 2), TypeError, "module: expected a SelfAttention, got Linear"),
    "heads": (
        lambda: make_layer(num_heads=3),
        ValueError,
        "device_mesh: expected a size that divides the 3 query heads, got 2",
    ),
    "key heads": (
        lambda: make_layer(num_heads=6, num_kv_heads=3),
        ValueError,
        "device_mesh: expected a size that divides the 3 key heads, or is a multiple of them, got 2",
    ),
    "wrapped projection": (
        lambda: with_hook("q_proj"),
        TypeError,
        "q_proj: expected a plain Linear with nothing wrapped",
    ),
    "wrapped norm": (lambda: with_hook("k_norm"), TypeError, "k_norm: expected a plain RMSNorm with nothing wrapped"),
    "config of another axis": (
        lambda: make_layer(parallel=ParallelConfig(fsdp_axis_size=2)),
        ValueError,
        "got config.parallel with fsdp_axis_size 2",
    ),
}


def check_layers() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for make, error, text in LAYERS.values():
        with pytest.raises(error, match=re.escape(text)):
            parallelize_module(make(), mesh, TensorParallel())
    layer = parallelize_module(make_layer(), mesh, TensorParallel())
    cache = selfattn.KVCache.dense(1, 2, 16, num_kv_heads=layer.num_kv_heads, head_dim=8, dtype=torch.float32)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="cache: expected None in a layer whose heads"):
        layer(X, cache=cache.layer(0))
    with pytest.raises(ValueError, match=r"expected a layer that is not parallel yet.*, got one that is parallel"):
        parallelize_module(layer, mesh, TensorParallel())
    with pytest.raises(ValueError, match="device_mesh: expected one dimension"):
        TensorParallel()._apply(make_layer(), init_device_mesh("cpu", (2, 1)))


def test_layers_that_cannot_be_spread(ranks: Ranks) -> None:
    ranks.run(check_layers, 2)


def check_calls() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    layer = parallelize_module(make_layer(), mesh, TensorParallel())
    shards = parallelize_module(make_layer(), mesh, TensorParallel(sequence_parallel=True))
    ids = torch.zeros(2, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=re.escape("x: expected (B, S, 32), got shape (2, 8, 16)")):
        layer(X[..., :16])
    with pytest.raises(ValueError, match=re.escape("x: expected (B, S / n, 32), got shape (8, 32)")):
        shards(X[0])
    with pytest.raises(TypeError, match=r"x: expected the dtype of the weights, torch.float32, got torch.bfloat16"):
        layer(X.bfloat16())
    with pytest.raises(TypeError, match="x: expected a plain tensor, got a DTensor"):
        layer(distribute_tensor(X, mesh, [Replicate()]))
    with pytest.raises(
        ValueError, match=re.escape("those of whole rows, (B, 16), for x of (B, 8, E) on each of 2 ranks")
    ):
        shards(X, segment_ids=ids)
    with pytest.raises(NotImplementedError, match="TorchScript: expected a layer on one device, got a parallel one"):
        torch.jit.script(layer)
    layer.v_proj = nn.Sequential(layer.v_proj)
    with pytest.raises(
        TypeError, match="v_proj: expected a plain Linear with nothing wrapped around it, got Sequential"
    ):
        layer(X)


def test_calls_that_are_refused(ranks: Ranks) -> None:
    ranks.run(check_calls, 2)


def check_models() -> None:
    config = ParallelConfig(model_axis_size=2)
    mesh = config.device_mesh("cpu")

    def refused(error: type[Exception], text: str, model: nn.Module, mesh: Any, config: Any) -> None:
        with pytest.raises(error, match=re.escape(text)):
            parallelize(model, mesh, config)

    model = make_model()
    refused(TypeError, "model: expected a Module, got int", 1, mesh, config)
    refused(TypeError, "mesh: expected a DeviceMesh, got str", model, "cpu", config)
    refused(TypeError, "config: expected a ParallelConfig, got dict", model, mesh, {})
    other = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    axes = "('pp', 'dp', 'fsdp', 'cp', 'tp')"
    refused(ValueError, f"mesh: expected the axes {axes} of config.device_mesh(), got ('tp',)", model, other, config)
    wide = ParallelConfig(fsdp_axis_size=2)
    refused(ValueError, "mesh: expected config.fsdp_axis_size, 2, ranks, got 1", model, mesh, wide)
    asked = ParallelConfig(pipeline_axis_size=2)
    refused(NotImplementedError, "torch.distributed.pipelining", model, asked.device_mesh("cpu"), asked)
    for field in ("remat", "fsdp_modules"):
        asked = ParallelConfig(model_axis_size=2, **{field: ["Block", "Blok", "Atention"]})
        known = "Block, Embedding, LanguageModel, Linear, ModuleList, RMSNorm, SelfAttention"
        text = f"config.{field}: expected class names of the model's modules, {known}; got Blok, Atention"
        refused(ValueError, text, model, mesh, asked)
    refused(
        ValueError, "expected a SelfAttention for the model axis of 2 ranks, got none", nn.Linear(2, 2), mesh, config
    )
    text = "config: expected the one of layer 'blocks.0.attn', which has fsdp_axis_size 2, got ParallelConfig("
    refused(ValueError, text, make_model(wide), mesh, config)
    model.head.to("meta")
    parallelize(model, mesh, config)


def test_models_that_are_refused(ranks: Ranks) -> None:
    ranks.run(check_models, 2)


def check_disagreement() -> None:
    rank = dist.get_rank()
    config = ParallelConfig(model_axis_size=2, tp_async_dense=rank == 1)
    text = f"expected the same config on the 2 ranks of the mesh, got others on some; rank {rank} has config Parallel"
    with pytest.raises(ValueError, match=re.escape(text)):
        parallelize(make_model(), config.device_mesh("cpu"), config)
    config = ParallelConfig(model_axis_size=2)
    with pytest.raises(ValueError, match="expected the same parameters on the 2 ranks of the mesh"):
        parallelize(make_model(dtype="float32" if rank else "float64"), config.device_mesh("cpu"), config)


def test_ranks_that_disagree_on_the_model(ranks: Ranks) -> None:
    ranks.run(check_disagreement, 2)


def check_disagreement_of_calls() -> None:
    """Every call is compared where TORCH_DISTRIBUTED_DEBUG is set."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    layer = parallelize_module(make_layer(dropout_rate=0.5), mesh, TensorParallel())
    ids = torch.zeros(2, 8, dtype=torch.int32)
    dist.set_debug_level(dist.DebugLevel.INFO)
    try:
        layer(X, segment_ids=ids)
        for name, x, segment_ids in (
            ("x and content of x", X[:, : 8 - rank], None),
            ("content of x", X + rank, ids),
            ("segment_ids", X, ids + rank),
        ):
            with pytest.raises(ValueError, match=f"expected the same {name} on the 2 ranks of the mesh"):
                layer(x, segment_ids=segment_ids)
        torch.manual_seed(rank)
        with pytest.raises(ValueError, match="expected the same random numbers of dropout on the 2 ranks"):
            layer(X)
        layer.eval()(X)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


def test_ranks_that_disagree_on_a_call(ranks: Ranks) -> None:
    ranks.run(check_disagreement_of_calls, 2)


def die_in_backward() -> float:
    config = ParallelConfig(fsdp_axis_size=2, fsdp_modules=["Block"], fsdp_min_weight_size=0)
    model = parallelize(make_model(config), config.device_mesh("cpu"), config)
    loss_of(model, 0).backward()
    if dist.get_rank() == 1:
        os._exit(7)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"Connection (closed|reset) by peer"):
        model(*make_batch(0, model))
    return time.monotonic() - began


def test_rank_that_dies(ranks: Ranks) -> None:
    (survived, seconds), (other_survived, text) = ranks.outcomes(die_in_backward, 2)
    assert survived, seconds
    assert seconds < 30
    assert not other_survived and text == "ended with exit code 7"
