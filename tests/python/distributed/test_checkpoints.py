"""Promise: a checkpoint of torch.distributed.checkpoint that four ranks have saved is loaded by two, by one, and by a
process without a process group, whichever axes there were; training goes on as if it had not stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from support.problems import error
from support.ranks import Ranks
from support.small_model import data_rank, make_model, make_optimizer, train, train_mean, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from selfattn import ParallelConfig
from selfattn.distributed import parallelize

FSDP = {"fsdp_modules": ["Block"], "fsdp_min_weight_size": 100}
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
"""The optimizer's state by the parameters' names: groups of parameters differ with the axes."""


class State(Stateful):
    """Model and optimizer, in PyTorch's way."""

    def __init__(self, fields: dict[str, Any] | None, seed: int) -> None:
        config = ParallelConfig(**fields or {})
        self.model: nn.Module = make_model(config, seed=seed)
        if fields is not None:
            mesh = config.device_mesh("cpu")
            self.batch = data_rank(mesh, config)
            self.model = parallelize(self.model, mesh, config)
        self.optimizer = make_optimizer(self.model)

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=BY_NAME)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **states, options=BY_NAME)


def save(fields: dict[str, Any], folder: str) -> None:
    """After a step in which each data rank computes a batch."""
    state = State(fields, seed=3)
    train(state.model, state.optimizer, [state.batch])
    dcp.save({"state": state}, checkpoint_id=folder)


def load(fields: dict[str, Any] | None, folder: str, saved_batches: int) -> None:
    """Into other weights; then a step in which every rank computes the same batch."""
    state = State(fields, seed=5)
    dcp.load({"state": state}, checkpoint_id=folder, no_dist=fields is None)
    alone = make_model()
    optimizer = make_optimizer(alone)
    train_mean(alone, optimizer, range(saved_batches))
    check_equal(state.model, alone)
    train(state.model, state.optimizer, [7])
    train(alone, optimizer, [7])
    check_equal(state.model, alone)


def check_equal(model: nn.Module, alone: nn.Module) -> None:
    expected = alone.state_dict()
    for name, parameter in get_model_state_dict(model).items():
        assert error(whole(parameter), expected[name]) < 1e-9, name


@pytest.mark.parametrize(
    ("saved", "batches"),
    [
        ({"fsdp_axis_size": 4, **FSDP}, 4),
        ({"fsdp_axis_size": 2, "model_axis_size": 2, "remat": ["SelfAttention"], **FSDP}, 2),
        ({"model_axis_size": 4}, 1),
        ({}, 4),
    ],
    ids=str,
)
def test_four_ranks_save_and_fewer_load(ranks: Ranks, tmp_path: Path, saved: dict[str, Any], batches: int) -> None:
    ranks.run(save, 4, saved, str(tmp_path))
    for fields in ({"fsdp_axis_size": 2, **FSDP}, {"model_axis_size": 2}):
        ranks.run(load, 2, fields, str(tmp_path), batches)
    ranks.run(load, 1, {}, str(tmp_path), batches)
    load(None, str(tmp_path), batches)
