"""Promise: a model on which ``parallelize`` has applied a ParallelConfig trains as one process with every rank's batch
does, whichever axes are there; and every field does what it says."""

from typing import Any

import pytest
import torch
from support.problems import error
from support.ranks import Ranks
from support.small_model import (
    data_rank,
    loss_of,
    make_model,
    make_optimizer,
    train,
    train_alone,
    whole,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from selfattn import ParallelConfig, SelfAttention
from selfattn.distributed import clip_grad_norm_, parallelize

STEPS = range(3)
FSDP = {"fsdp_modules": ["Block"], "fsdp_min_weight_size": 0}
SMALL_WHOLE = {"fsdp_modules": ["Block"], "fsdp_min_weight_size": 100}


def make_parallel(fields: dict[str, Any], **options: Any) -> tuple[nn.Module, int, int]:
    """The model, which batch this rank takes, and of how many."""
    config = ParallelConfig(**fields)
    mesh = config.device_mesh("cpu")
    model = parallelize(make_model(config, **options), mesh, config)
    return model, data_rank(mesh, config), mesh["dp"].size() * mesh["fsdp"].size()


def check_training(fields: dict[str, Any], seeds_differ: bool = False) -> None:
    model, rank, ranks = make_parallel(fields, seed=3 + torch.distributed.get_rank() * seeds_differ)
    train(model, make_optimizer(model), [step * ranks + rank for step in STEPS])
    alone, initial = train_alone(ranks, STEPS).state_dict(), make_model().state_dict()
    trained = get_model_state_dict(model)
    assert trained.keys() == alone.keys()
    for name, parameter in trained.items():
        assert error(whole(parameter), alone[name]) < 1e-9, name
        assert error(alone[name], initial[name]) > 1e-2, name


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"fsdp_axis_size": 2, **FSDP},
        {"fsdp_axis_size": 2, **SMALL_WHOLE, "fsdp_modules": ["SelfAttention", "Block"]},
        {"fsdp_axis_size": 2},
        {"fsdp_modules": ["Block"]},
        {"model_axis_size": 2},
        {"model_axis_size": 2, "tp_async_dense": True, "remat": ["SelfAttention"]},
        {"remat": ["Block", "SelfAttention"]},
        {"fsdp_axis_size": 2, "remat": ["Block"], **FSDP},
        {"fsdp_axis_size": 2, "remat": ["SelfAttention"], "fsdp_modules": ["SelfAttention"], "fsdp_min_weight_size": 8},
    ],
    ids=str,
)
def test_two_ranks(ranks: Ranks, fields: dict[str, Any]) -> None:
    ranks.run(check_training, 2, fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"fsdp_axis_size": 2, **SMALL_WHOLE},
        {"fsdp_axis_size": 2, "model_axis_size": 2, **FSDP},
        {"fsdp_axis_size": 2, "model_axis_size": 2, "tp_async_dense": True, **SMALL_WHOLE},
        {"model_axis_size": 2},
        {"model_axis_size": 4, "remat": ["Block"]},
        {"fsdp_axis_size": 2, "model_axis_size": 2, "remat": ["Block"], **FSDP},
    ],
    ids=str,
)
def test_four_ranks(ranks: Ranks, fields: dict[str, Any]) -> None:
    ranks.run(check_training, 4, fields)


@pytest.mark.parametrize("fields", [{}, {"fsdp_axis_size": 2, **FSDP}, {"model_axis_size": 2}], ids=str)
def test_weights_of_the_first_rank_count(ranks: Ranks, fields: dict[str, Any]) -> None:
    ranks.run(check_training, 2, fields, True)


def check_accumulation(fields: dict[str, Any]) -> None:
    """Two backward passes before one step: gradients are sums of the passes' means over ranks."""
    model, rank, ranks = make_parallel(fields)
    alone = make_model()
    for step in range(2):
        loss_of(model, step * ranks + rank).backward()
        (sum(loss_of(alone, step * ranks + number) for number in range(ranks)) / ranks).backward()
    for (name, parameter), reference in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert error(whole(parameter.grad), reference.grad) < 1e-9, name


@pytest.mark.parametrize("fields", [{"fsdp_axis_size": 2, **SMALL_WHOLE}, {"model_axis_size": 2}], ids=str)
def test_gradients_of_several_passes_add_up(ranks: Ranks, fields: dict[str, Any]) -> None:
    ranks.run(check_accumulation, 2, fields)


def check_unused_weight() -> None:
    """The first rank's loss does not depend on a small weight, the other's does."""
    config = ParallelConfig(fsdp_axis_size=2, **SMALL_WHOLE)
    mesh = config.device_mesh("cpu")
    model = make_model(config)
    model.gain = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    model = parallelize(model, mesh, config)
    loss = loss_of(model, 0)
    (loss if mesh.get_rank() == 0 else loss * model.gain).backward()
    assert error(model.gain.grad, loss.detach() / 2) < 1e-12


def test_whole_weight_that_a_rank_does_not_use(ranks: Ranks) -> None:
    ranks.run(check_unused_weight, 2)


def check_data_parallel() -> None:
    model, _, _ = make_parallel({})
    assert isinstance(model, DistributedDataParallel)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_data_axis_alone_is_ddp(ranks: Ranks) -> None:
    ranks.run(check_data_parallel, 2)


def check_sharded_modules() -> None:
    model, _, _ = make_parallel({"fsdp_axis_size": 2, **SMALL_WHOLE})
    sharded = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert sharded == {"", "blocks.0", "blocks.1"}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) == (parameter.numel() >= 100), name


def test_modules_and_weights_that_fsdp_shards(ranks: Ranks) -> None:
    ranks.run(check_sharded_modules, 2)


def check_dtypes() -> None:
    fields = {"fsdp_gather_dtype": "bfloat16", "fsdp_grad_scatter_dtype": "float32", "fsdp_axis_size": 2, **FSDP}
    model, rank, _ = make_parallel(fields, dtype="float32")
    seen = []
    model.blocks[0].attn.register_forward_hook(
        lambda layer, _, out: seen.append((layer.q_proj.weight.dtype, out.dtype))
    )
    loss_of(model, rank).backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    weight = model.blocks[0].attn.q_proj.weight
    assert weight.dtype == weight.grad.dtype == torch.float32
    # Sums of bfloat16 gradients in float32 have more digits than bfloat16.
    local = weight.grad.to_local()
    assert (local != local.bfloat16().float()).any()


def test_dtypes_of_gathering_and_of_gradients(ranks: Ranks) -> None:
    ranks.run(check_dtypes, 2)


def check_recomputed(names: list[str], calls: int) -> None:
    """Forward passes of an attention layer in one training step."""
    model, rank, _ = make_parallel({"remat": names, "fsdp_axis_size": 2, **FSDP})
    count = 0

    def counting(*_: Any) -> None:
        nonlocal count
        count += 1

    next(module for module in model.modules() if isinstance(module, SelfAttention)).register_forward_pre_hook(counting)
    loss_of(model, rank).backward()
    assert count == calls


@pytest.mark.parametrize(("names", "calls"), [([], 1), (["SelfAttention"], 2), (["Block"], 2), (["Linear"], 1)])
def test_recomputed_modules(ranks: Ranks, names: list[str], calls: int) -> None:
    ranks.run(check_recomputed, 2, names, calls)


def check_overlap(overlaps: bool) -> None:
    model, _, _ = make_parallel({"model_axis_size": 2, "tp_async_dense": overlaps})
    assert model.blocks[0].attn._parallel_forward.group.overlaps == overlaps
    placements = {name: parameter.placements for name, parameter in model.blocks[0].attn.named_parameters()}
    assert placements == {
        "sinks": (Shard(0),),
        "q_proj.weight": (Shard(0),),
        "k_proj.weight": (Shard(0),),
        "v_proj.weight": (Shard(0),),
        "out_proj.weight": (Shard(1),),
        "q_norm.weight": (Replicate(),),
        "k_norm.weight": (Replicate(),),
    }


@pytest.mark.parametrize("overlaps", [False, True])
def test_model_axis_of_layers(ranks: Ranks, overlaps: bool) -> None:
    ranks.run(check_overlap, 2, overlaps)


def check_meta() -> None:
    """A model without memory is spread, given memory and weights, and trained."""
    config = ParallelConfig(fsdp_axis_size=2, model_axis_size=2, **SMALL_WHOLE)
    mesh = config.device_mesh("cpu")
    with torch.device("meta"):
        model = parallelize(make_model(config), mesh, config)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, (SelfAttention, nn.Linear, nn.Embedding, nn.RMSNorm)):
            module.reset_parameters()
    assert model.blocks[0].attn.q_proj.weight.full_tensor().std() > 0.05
    set_model_state_dict(model, make_model().state_dict(), options=StateDictOptions(full_state_dict=True))
    rank, ranks = data_rank(mesh, config), 2
    train(model, make_optimizer(model), [step * ranks + rank for step in STEPS])
    alone = train_alone(ranks, STEPS).state_dict()
    for name, parameter in get_model_state_dict(model).items():
        assert error(whole(parameter), alone[name]) < 1e-9, name


def test_model_on_meta(ranks: Ranks) -> None:
    ranks.run(check_meta, 4)


def check_clipping(fields: dict[str, Any], norm_type: float) -> None:
    """The norm is that of one process, and so are the gradients after a step of clipping."""
    model, rank, ranks = make_parallel(fields)
    alone = make_model()
    loss_of(model, rank).backward()
    (sum(loss_of(alone, number) for number in range(ranks)) / ranks).backward()
    expected = nn.utils.clip_grad_norm_(alone.parameters(), 0.1, norm_type)
    norm = clip_grad_norm_(model.parameters(), 0.1, norm_type)
    assert norm.shape == () and expected > 0.1
    assert error(norm, expected) < 1e-9
    for (name, parameter), reference in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert error(whole(parameter.grad), reference.grad) < 1e-9, name


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize(
    "fields",
    [{"model_axis_size": 4}, {"fsdp_axis_size": 2, "model_axis_size": 2, **SMALL_WHOLE}, {"fsdp_axis_size": 4, **FSDP}],
    ids=str,
)
def test_clipping(ranks: Ranks, fields: dict[str, Any], norm_type: float) -> None:
    ranks.run(check_clipping, 4, fields, norm_type)
