"""Promise: a layer whose heads are spread over ranks computes what one process computes, in values and gradients, with
every option of the layer."""

import copy
from typing import Any

import pytest
import torch
from support.problems import error, make_ids
from support.ranks import Ranks
from torch import Tensor
from torch._C._distributed_c10d import _get_work_registry_size
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from selfattn import SelfAttention, SelfAttentionConfig, precompute_freqs
from selfattn.distributed import TensorParallel, _projections

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
PLANS = {"whole_rows": {}, "sequence_parallel": {"sequence_parallel": True}}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}


def make_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))


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


def check_layer(options: dict[str, Any], plan: dict[str, bool], dtype: torch.dtype) -> None:
    """Against the layer alone: the output, and the gradients of the input and of every parameter, twice added up."""
    layer = make_layer(dtype, **options)
    mesh = make_mesh()
    parallel = parallelize_module(copy.deepcopy(layer), mesh, TensorParallel(**plan))
    x, ids, grad = make_input(dtype)
    own = x.clone().requires_grad_()
    tolerance = TOLERANCES[dtype]

    def shard(tensor: Tensor) -> Tensor:
        shards = tensor.chunk(mesh.size(), 1)
        return shards[mesh.get_local_rank()] if plan.get("sequence_parallel") else tensor

    local = shard(x).clone().requires_grad_()
    for _ in range(2):
        expected = layer(own, None, ids)
        expected.backward(grad)
        out = parallel(local, None, ids)
        out.backward(shard(grad))
        assert error(out, shard(expected)) < tolerance
    assert error(local.grad, shard(own.grad)) < tolerance
    assert _get_work_registry_size() == 0  # collectives that nobody has waited for
    for (name, parameter), (_, reference) in zip(parallel.named_parameters(), layer.named_parameters(), strict=True):
        assert parameter.shape == reference.shape, name
        assert error(whole(parameter), reference) == 0, name
        assert error(whole(parameter.grad), reference.grad) < tolerance, name


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", [2, 4])
def test_every_option(ranks: Ranks, size: int, options: dict[str, Any], plan: dict[str, bool]) -> None:
    ranks.run(check_layer, size, options, plan, torch.float64)


KERNELS = {"qk_norm": True, "num_kv_heads": 2, "sinks": True, "use_bias": True, "window_left": 5}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_kernels_in_float32(ranks: Ranks, plan: dict[str, bool]) -> None:
    ranks.run(check_layer, 2, KERNELS, plan, torch.float32)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_collectives_that_end_where_they_start(ranks: Ranks, plan: dict[str, bool]) -> None:
    ranks.run(check_layer, 2, KERNELS, plan | {"overlap": False}, torch.float64)


SUM, SUMS, GATHER, SCATTER = COLLECTIVES = (
    "all_reduce_",
    "all_reduce_coalesced_",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
)


class Calls(TorchDispatchMode):
    """The names of the operators that run, and of those that DTensor dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.of_dtensors: list[str] = []

    @property
    def collectives(self) -> list[str]:
        return [name for name in self.names if name in COLLECTIVES]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2]
        (self.of_dtensors if any(issubclass(kind, DTensor) for kind in types) else self.names).append(name)
        return func(*args, **(kwargs or {}))


def check_halves() -> None:
    """With the forward sum in two halves, whatever the length."""
    _projections._LEAST_TOKENS_OF_HALF = 1
    try:
        check_layer({"num_kv_heads": 2, "out_bias": True}, {}, torch.float64)
        with Calls() as calls:
            make_parallel()(make_input()[0])
        assert calls.collectives == ["all_reduce_"] * 2
    finally:
        _projections._LEAST_TOKENS_OF_HALF = 1024


def make_parallel(**options: Any) -> SelfAttention:
    return parallelize_module(make_layer(**options), make_mesh(), TensorParallel())


def test_forward_sum_in_halves(ranks: Ranks) -> None:
    ranks.run(check_halves, 2)


def check_dispatch() -> None:
    layer = make_parallel(**KERNELS, dtype=torch.float32)
    x, ids, grad = make_input(torch.float32)
    with Calls() as calls:
        layer(x.requires_grad_(), None, ids).backward(grad)
    assert not set(calls.of_dtensors) - {"detach"}  # of gradients that become a parameter's
    assert "qk_norm_rope_attention_backward" in calls.names


def test_nothing_is_dispatched_by_dtensor(ranks: Ranks) -> None:
    ranks.run(check_dispatch, 2)


def check_order(overlap: bool) -> None:
    """The collective of the input's gradient is started before the products of the weights' gradients, and waited for
    behind them."""
    layer = parallelize_module(make_layer(), make_mesh(), TensorParallel(overlap=overlap))
    x, ids, grad = make_input()
    out = layer(x.requires_grad_(), None, ids)
    with Calls() as calls:
        out.backward(grad)
    events = [name for name in calls.names if name in ("mm", "addmm_", "all_reduce_", "wait_tensor")]
    output, inputs, weights = ["mm"] * 2, ["mm", "addmm_", "addmm_"], ["mm"] * 3
    if overlap:
        assert events == [*output, *inputs, "all_reduce_", *weights, "wait_tensor"]
    else:
        assert events == [*output, *inputs, "all_reduce_", "wait_tensor", *weights]


@pytest.mark.parametrize("overlap", [True, False])
def test_sum_of_the_input_gradient_runs_beside_the_weight_gradients(ranks: Ranks, overlap: bool) -> None:
    ranks.run(check_order, 2, overlap)


def check_collectives(options: dict[str, Any], plan: dict[str, bool], forward: list[str], backward: list[str]) -> None:
    layer = parallelize_module(make_layer(**options), make_mesh(), TensorParallel(**plan))
    x = make_input()[0]
    if plan.get("sequence_parallel"):
        x = x.chunk(2, 1)[torch.distributed.get_rank()]
    with Calls() as calls:
        out = layer(x.clone().requires_grad_())
    assert calls.collectives == forward
    with Calls() as calls:
        out.sum().backward()
    assert calls.collectives == backward


@pytest.mark.parametrize(
    ("options", "plan", "forward", "backward"),
    [
        ({}, {}, [SUM], [SUM]),
        ({"qk_norm": True, "sinks": True}, {}, [SUM], [SUM, SUMS]),
        ({"qk_norm": True, "num_kv_heads": 1, "use_bias": True}, {}, [SUM], [SUM, SUMS]),
        ({}, {"sequence_parallel": True}, [GATHER, SCATTER], [GATHER, GATHER, SCATTER]),
    ],
    ids=["plain", "norms", "one_key_head", "sequence_parallel"],
)
def test_collectives(
    ranks: Ranks, options: dict[str, Any], plan: dict[str, bool], forward: list[str], backward: list[str]
) -> None:
    ranks.run(check_collectives, 2, options, plan, forward, backward)


def check_freqs(plan: dict[str, bool]) -> None:
    """Tables of the whole row on every rank."""
    layer = make_layer()
    x, ids, _ = make_input()
    freqs = precompute_freqs(HEAD_DIM, torch.arange(LENGTH).flip(0)[None], dtype=torch.float64)
    expected = layer(x, freqs, ids)
    parallel = parallelize_module(layer, make_mesh(), TensorParallel(**plan))
    rank = torch.distributed.get_rank() if plan else 0
    shards = 2 if plan else 1
    actual = parallel(x.chunk(shards, 1)[rank], freqs, ids)
    assert error(actual, expected.chunk(shards, 1)[rank]) < 1e-12


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_rotary_tables(ranks: Ranks, plan: dict[str, bool]) -> None:
    ranks.run(check_freqs, 2, plan)


def check_frozen() -> None:
    """Parameters and an input that need no gradient."""
    layer = make_layer(num_kv_heads=1, qk_norm=True, use_bias=True)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in ("k_proj.weight", "q_proj.bias", "k_norm.weight"))
    parallel = parallelize_module(copy.deepcopy(layer), make_mesh(), TensorParallel())
    x, ids, grad = make_input()
    layer(x, None, ids).backward(grad)
    parallel(x, None, ids).backward(grad)
    for (name, parameter), reference in zip(parallel.named_parameters(), layer.parameters(), strict=True):
        assert (parameter.grad is None) == (reference.grad is None), name
        if reference.grad is not None:
            assert error(whole(parameter.grad), reference.grad) < 1e-12, name
    with torch.no_grad():
        assert error(parallel(x, None, ids), layer(x, None, ids)) < 1e-12


def test_frozen_parameters_and_no_grad(ranks: Ranks) -> None:
    ranks.run(check_frozen, 2)


def check_copy() -> None:
    """As running means of weights are kept: a copy computes with its own."""
    layer = make_parallel(**KERNELS)
    x, ids, _ = make_input()
    other = copy.deepcopy(layer)
    expected = layer(x, None, ids)
    assert error(other(x, None, ids), expected) == 0
    with torch.no_grad():
        layer.v_proj.weight.mul_(2)
    assert error(other(x, None, ids), expected) == 0
    assert error(layer(x, None, ids), expected) > 0.1


def test_copy(ranks: Ranks) -> None:
    ranks.run(check_copy, 2)


def check_dropout() -> None:
    """One seed on every rank drops what one process drops."""
    layer = make_layer(dropout_rate=0.5)
    parallel = parallelize_module(copy.deepcopy(layer), make_mesh(), TensorParallel())
    x, ids, _ = make_input()
    outs = []
    for module in (layer, parallel):
        torch.manual_seed(4)
        outs.append(module(x, None, ids))
    assert error(outs[1], outs[0]) < 1e-12
    assert (outs[0] == 0).any()
    assert error(parallel.eval()(x, None, ids), layer.eval()(x, None, ids)) < 1e-12


def test_dropout(ranks: Ranks) -> None:
    ranks.run(check_dropout, 2)


def check_autocast() -> None:
    layer = make_layer(torch.float32, qk_norm=True, use_bias=True)
    parallel = parallelize_module(copy.deepcopy(layer), make_mesh(), TensorParallel())
    x, ids, grad = make_input(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = layer(x, None, ids), parallel(x, None, ids)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert error(actual, expected) < 2e-2
    expected.backward(grad.bfloat16())
    actual.backward(grad.bfloat16())
    for (name, parameter), reference in zip(parallel.named_parameters(), layer.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32, name
        assert error(whole(parameter.grad), reference.grad) < 3e-2, name


def test_autocast(ranks: Ranks) -> None:
    ranks.run(check_autocast, 2)


def check_compile(plan: dict[str, bool]) -> None:
    layer = parallelize_module(make_layer(**KERNELS, dtype=torch.float32), make_mesh(), TensorParallel(**plan))
    x, ids, grad = make_input(torch.float32)
    if plan:
        x, grad = (tensor.chunk(2, 1)[torch.distributed.get_rank()].contiguous() for tensor in (x, grad))
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        own = x.clone().requires_grad_()
        layer.zero_grad()
        out = call(own, None, ids)
        out.backward(grad)
        results.append([out, own.grad, *(parameter.grad.to_local().clone() for parameter in layer.parameters())])
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager) < 2e-5


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_compiled(ranks: Ranks, plan: dict[str, bool]) -> None:
    ranks.run(check_compile, 2, plan)
