"""Promise: the operators take DTensors that are replicated, or sharded by batches or heads; PyTorch's own plans shard
the projections of a layer; a sharded sequence is refused."""

import copy
from typing import Any

import pytest
import torch
from support.problems import error, make_ids
from support.ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import selfattn
from selfattn import SelfAttention, SelfAttentionConfig

BATCH, LENGTH, DIM = 2, 12, 8
PLACEMENTS = {"replicated": Replicate(), "batches": Shard(0), "heads": Shard(2)}


def make_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))


def check_operator(
    operator: str,
    placement: Placement,
    inputs: dict[str, tuple[int, ...]],
    options: dict[str, Any],
    id_dtype: torch.dtype = torch.int32,
) -> None:
    """Values and gradients of every floating input against plain tensors; the forward pass communicates nothing."""
    mesh = make_mesh()
    torch.manual_seed(0)
    plain = {name: torch.randn(shape) for name, shape in inputs.items()}
    ids = {name: make_ids("packed", BATCH, LENGTH).to(id_dtype) for name in ("segment_ids",) if "attention" in operator}
    call = getattr(torch.ops.selfattn, operator)

    def place(name: str, tensor: torch.Tensor) -> DTensor:
        by_heads = placement == Shard(2)
        if tensor.dim() == 1:
            own = Shard(0) if by_heads and name == "sinks" else Replicate()
        else:
            own = Replicate() if by_heads and name not in ("q", "k", "v") else placement
        return distribute_tensor(tensor, mesh, [own])

    own = {name: tensor.clone().requires_grad_() for name, tensor in plain.items()}
    sharded = {name: place(name, tensor).requires_grad_() for name, tensor in plain.items()}
    expected = call(**own, **ids, **options)
    placed_ids = {name: place(name, tensor) for name, tensor in ids.items()}
    with CommDebugMode() as communication:
        actual = call(**sharded, **placed_ids, **options)
    assert communication.get_total_counts() == 0
    expected, actual = ([r] if isinstance(r, torch.Tensor) else list(r) for r in (expected, actual))
    for one, other in zip(actual, expected, strict=True):
        if other.dim() == 4:
            assert one.placements == (placement,)
        assert error(one.full_tensor(), other) < 1e-5
    weights = [torch.randn_like(result) for result in expected]
    sum((w * r).sum() for w, r in zip(weights, expected, strict=True)).backward()
    sum((w * r.full_tensor()).sum() for w, r in zip(weights, actual, strict=True)).backward()
    for name in inputs:
        assert error(sharded[name].grad.full_tensor(), own[name].grad) < 1e-5, name


HEADS = {"q": (BATCH, LENGTH, 4, DIM), "k": (BATCH, LENGTH, 2, DIM), "v": (BATCH, LENGTH, 2, DIM)}
NORMS = {"q_weight": (DIM,), "k_weight": (DIM,)}


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize(
    ("operator", "inputs", "options"),
    [
        ("multihead_attention", HEADS, {"window_left": 4}),
        ("multihead_attention_lse", HEADS | {"sinks": (4,)}, {}),
        ("qk_norm_rope", {name: HEADS[name] for name in "qk"} | NORMS, {}),
        ("qk_norm_rope_attention", HEADS | NORMS | {"sinks": (4,)}, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operator(
    ranks: Ranks, operator: str, inputs: dict[str, tuple[int, ...]], options: dict[str, Any], placement: Placement
) -> None:
    ranks.run(check_operator, 2, operator, placement, inputs, options)


@pytest.mark.parametrize("operator", ["multihead_attention", "qk_norm_rope_attention"])
def test_int64_ids(ranks: Ranks, operator: str) -> None:
    ranks.run(check_operator, 2, operator, Shard(2), HEADS, {}, torch.int64)


def test_key_heads_that_the_mesh_does_not_divide_are_gathered(ranks: Ranks) -> None:
    one_head = (BATCH, LENGTH, 1, DIM)
    ranks.run(check_gathered, 2, HEADS | {"k": one_head, "v": one_head})


def check_gathered(inputs: dict[str, tuple[int, ...]]) -> None:
    mesh = make_mesh()
    torch.manual_seed(0)
    plain = {name: torch.randn(shape, requires_grad=True) for name, shape in inputs.items()}
    sharded = {
        name: distribute_tensor(x.detach(), mesh, [Shard(2) if name == "q" else Replicate()]).requires_grad_()
        for name, x in plain.items()
    }
    expected, actual = selfattn.multihead_attention(**plain), selfattn.multihead_attention(**sharded)
    assert error(actual.full_tensor(), expected) < 1e-5
    expected.square().sum().backward()
    actual.full_tensor().square().sum().backward()
    for name in inputs:
        assert error(sharded[name].grad.full_tensor(), plain[name].grad) < 1e-5, name


def check_refusal() -> None:
    mesh = make_mesh()
    q = distribute_tensor(torch.randn(BATCH, LENGTH, 2, DIM), mesh, [Shard(1)])
    with pytest.raises(Exception, match=r"q: expected heads or batches sharded.* that is context parallelism"):
        selfattn.multihead_attention(q, q, q)


def test_sharded_sequence_is_refused(ranks: Ranks) -> None:
    ranks.run(check_refusal, 2)


PLAN = {
    "q_proj": ColwiseParallel(),
    "k_proj": ColwiseParallel(),
    "v_proj": ColwiseParallel(),
    "out_proj": RowwiseParallel(),
}
SEQUENCE_NORM = SequenceParallel(sequence_dim=2)


def check_plan(options: dict[str, Any], plan: dict[str, Any], takes_dtensors: bool = False) -> None:
    mesh = make_mesh()
    torch.manual_seed(1)
    layer = SelfAttention(32, SelfAttentionConfig(head_dim=8, **options), dtype=torch.float32)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    sharded = parallelize_module(copy.deepcopy(layer), mesh, plan)
    x, ids = torch.randn(BATCH, LENGTH, 32), make_ids("packed", BATCH, LENGTH)
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = layer(own, None, ids)
    actual = sharded(DTensor.from_local(other, mesh, [Replicate()]) if takes_dtensors else other, None, ids)
    assert error(actual, expected) < 1e-5
    expected.square().sum().backward()
    actual.square().sum().backward()
    assert error(other.grad, own.grad) < 1e-5
    for (name, parameter), reference in zip(sharded.named_parameters(), layer.parameters(), strict=True):
        grad = parameter.grad
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        assert error(grad, reference.grad) < 1e-5, name


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"num_kv_heads": 2, "use_bias": True}, {}),
        ({"qk_norm": True, "sinks": True}, {}),
        ({"qk_norm": True}, {"q_norm": SEQUENCE_NORM, "k_norm": SEQUENCE_NORM}),
        ({"num_kv_heads": 1}, {}),
        ({"num_kv_heads": 1}, {"k_proj": None, "v_proj": None}),
        ({"rotary_dim": 4}, {}),
    ],
    ids=["plain", "grouped", "norms_and_sinks", "planned_norms", "one_key_head", "replicated_key_head", "tables"],
)
def test_plan_of_pytorch(ranks: Ranks, options: dict[str, Any], changes: dict[str, Any]) -> None:
    ranks.run(check_plan, 2, options, {name: style for name, style in (PLAN | changes).items() if style is not None})


def test_plan_of_pytorch_for_dtensors(ranks: Ranks) -> None:
    ranks.run(check_plan, 2, {"qk_norm": True, "sinks": True, "num_kv_heads": 2}, PLAN, True)


def check_unplanned() -> None:
    mesh = make_mesh()
    layer = SelfAttention(32, SelfAttentionConfig(head_dim=8))
    layer.k_proj.weight = torch.nn.Parameter(distribute_tensor(layer.k_proj.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match=r"k_proj.weight is a DTensor and x is none: expected fully_shard"):
        layer(torch.randn(BATCH, LENGTH, 32))


def test_sharded_weight_without_a_plan_is_refused(ranks: Ranks) -> None:
    ranks.run(check_unplanned, 2)
