"""Promise: a layer whose heads are spread over ranks computes what one process computes, in values and gradients, with
every option of the layer."""

import copy
from typing import Any

import pytest
import torch
from support.problems import error, make_ids
from support.ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from selfattn import SelfAttention, SelfAttentionConfig
from selfattn.distributed import TensorParallel

BATCH, LENGTH, WIDTH, HEAD_DIM = 2, 12, 32, 8

OPTIONS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one_key_head": {"num_kv_heads": 1},
    "biases": {"use_bias": True},
    "biases_of_one_key_head": {"use_bias": True, "num_kv_heads": 1},
    "query_bias": {"qkv_bias": True},
    "out_bias": {"out_bias": True},
    "sinks": {"sinks": True},
    "qk_norm": {"qk_norm": True, "num_kv_heads": 2},
    "qk_norm_of_one_key_head": {"qk_norm": True, "num_kv_heads": 1},
    "norm_unit_offset": {"qk_norm": True, "norm_unit_offset": True, "norm_eps": 1e-3},
    "norm_of_projections": {"qk_norm": True, "qk_norm_scope": "projection", "num_kv_heads": 2},
    "norm_of_projections_unit_offset": {
        "qk_norm": True,
        "qk_norm_scope": "projection",
        "norm_unit_offset": True,
        "num_kv_heads": 1,
    },
    "windows": {"window_left": 3, "window_right": 1, "causal": False},
    "scale_and_softcap": {"qk_scale": 0.3, "softcap": 2.0},
    "rotation": {"rope_theta": 100.0, "rope_pairing": "half"},
    "partial_rotation": {"rotary_dim": 4},
    "scaled_rotation": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "no_rotation": {"rope": False},
    "more_heads_than_width": {"num_heads": 8, "num_kv_heads": 4},
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}


def make_layer(dtype: torch.dtype = torch.float64, **options: Any) -> SelfAttention:
    """The same on every rank, no parameter 0 or 1."""
    torch.manual_seed(1)
    layer = SelfAttention(WIDTH, SelfAttentionConfig(**{"head_dim": HEAD_DIM, **options}), dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def make_input(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, segment ids and the gradient of the output."""
    torch.manual_seed(2)
    x, grad = torch.randn(2, BATCH, LENGTH, WIDTH, dtype=dtype)
    return x, make_ids("packed", BATCH, LENGTH), grad


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_layer(options: dict[str, Any], plan: dict[str, bool], dtype: torch.dtype, freqs: Any = None) -> None:
    """Against the layer alone: the output, and the gradients of the input and of every parameter, twice added up."""
    layer = make_layer(dtype, **options)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    parallel = parallelize_module(copy.deepcopy(layer), mesh, TensorParallel(**plan))
    x, ids, grad = make_input(dtype)
    own = x.clone().requires_grad_()
    expected = layer(own, freqs, ids)
    tolerance = TOLERANCES[dtype]

    def shard(tensor: Tensor) -> Tensor:
        shards = tensor.chunk(mesh.size(), 1)
        return shards[mesh.get_local_rank()] if plan.get("sequence_parallel") else tensor

    local = shard(x).clone().requires_grad_()
    for _ in range(2):
        expected = layer(own, freqs, ids)
        expected.backward(grad)
        out = parallel(local, freqs, ids)
        out.backward(shard(grad))
        assert error(out, shard(expected)) < tolerance
    assert error(local.grad, shard(own.grad)) < tolerance
    for (name, parameter), (_, reference) in zip(parallel.named_parameters(), layer.named_parameters(), strict=True):
        assert parameter.shape == reference.shape, name
        assert error(whole(parameter), reference) == 0, name
        assert error(whole(parameter.grad), reference.grad) < tolerance, name


@pytest.mark.parametrize("plan", [{}, {"sequence_parallel": True}], ids=["whole_rows", "sequence_parallel"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", [2, 4])
def test_every_option(ranks: Ranks, size: int, options: dict[str, Any], plan: dict[str, bool]) -> None:
    ranks.run(check_layer, size, options, plan, torch.float64)
