"""Promise: the demo takes the same steps on ranks of any axes as in one process, documents stay apart on every rank, a
signal to one rank stops all at one step, and each of the two goes on from the other's checkpoint."""

import argparse
import os
import random
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import demo
import pytest
import torch
import torch.distributed as dist
from checks import Isolation, check_isolation
from demo import make_model, make_trainer
from packing import PackedRows, pack
from parallel import OneProcess, Ranks, add_options, find_ranks
from support import tiny_plan
from support.ranks import Ranks as Pool
from support.ranks import in_fake_job
from support.tiny_plan import CPU
from torch import Tensor
from training import Trainer, held_out_bits

from selfattn import ParallelConfig

PLAN = replace(tiny_plan.PLAN, row_length=31)
"""Ranks that share a row have a slot without a token."""
STOP = 4
"""The step at which training stops, and goes on elsewhere."""
CUT = {"context_balance": "head_tail", "fsdp_modules": ["Layer"], "fsdp_min_weight_size": 1024}
"""By itself the layout cuts no documents of so few tokens."""


def make_rows() -> tuple[PackedRows, PackedRows]:
    """For training, and held out: not as many as ranks."""
    choose = random.Random(1)
    documents = [bytes(choose.choices(range(97, 123), k=choose.randint(1, 40))) for _ in range(30)]
    return pack(documents, PLAN.row_length, seed=0), pack(documents[:4], PLAN.row_length, seed=0)[:3]


Outcome = tuple[list[float], float, list[float], Isolation]
"""The loss of each step, that held out, the norm of the last steps' gradients (AdamW does not tell their scale)."""


def finish(checkpoint: Path, ranks: OneProcess) -> Outcome:
    rows, held_out = make_rows()
    trainer = make_trainer(PLAN, rows, ranks)
    trainer.load(checkpoint)
    clip, norms = ranks.clip_gradients, []
    ranks.clip_gradients = lambda model, max_norm: norms.append(clip(model, max_norm).item())
    while trainer.step < PLAN.steps:
        trainer.train_one_step()
    bits = trainer.evaluate(held_out)
    weights = ranks.gather(trainer.model)
    if ranks.is_first:
        whole = make_model(PLAN)
        whole.load_state_dict(weights)
        assert held_out_bits(whole, held_out, PLAN.rows_per_step, CPU) == pytest.approx(bits, rel=1e-5)
    return trainer.history.bits_per_byte, bits, norms, check_isolation(trainer.model, rows, ranks)


def train_until_signal(ranks: OneProcess, folder: Path) -> Trainer:
    """The last rank is asked to stop in its last step."""
    demo.console.quiet = True
    rows, held_out = make_rows()
    trainer = make_trainer(PLAN, rows, ranks)
    train_one_step = trainer.train_one_step

    def step_and_signal() -> None:
        train_one_step()
        if trainer.step == STOP and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.train_one_step = step_and_signal
    assert not demo.train(trainer, held_out, PLAN.steps, folder, ranks)
    assert trainer.step == STOP
    return trainer


def check_leak_of_one_rank(trainer: Trainer, ranks: OneProcess) -> None:
    def leaking(tokens: Tensor, *others: Tensor, context: Any) -> Tensor:
        return trainer.model(tokens, *others, context=context) + (dist.get_rank() == 0) * tokens.sum()

    assert check_isolation(leaking, make_rows()[0], ranks).others_changed_too > 0


def train_on_ranks(fields: dict[str, Any], folder: Path, checkpoint: Path) -> Outcome:
    ranks = Ranks(ParallelConfig(**fields), "cpu")
    check_leak_of_one_rank(train_until_signal(ranks, folder), ranks)
    return finish(checkpoint, ranks)


@pytest.fixture(scope="module")
def checkpoint_of_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    trainer = make_trainer(PLAN, make_rows()[0], CPU)
    while trainer.step < STOP:
        trainer.train_one_step()
    trainer.save(folder)
    return checkpoints.latest(folder)


@pytest.fixture(scope="module")
def alone(checkpoint_of_one: Path) -> Outcome:
    outcome = finish(checkpoint_of_one, OneProcess(torch.device("cpu")))
    isolation = outcome[-1]
    assert isolation.holds and isolation.documents_changed > 10
    return outcome


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        (2, {"data_axis_size": 2}),
        (2, {"model_axis_size": 2}),
        (2, {"context_axis_size": 2, **CUT}),
        (4, {"fsdp_axis_size": 2, "context_axis_size": 2, **CUT}),
        (4, {"data_axis_size": 2, "model_axis_size": 2}),
    ],
    ids=["data", "model", "context", "fsdp and context", "data and model"],
)
def test_ranks_train_as_one_process(
    ranks: Pool, size: int, fields: dict[str, Any], alone: Outcome, checkpoint_of_one: Path, tmp_path: Path
) -> None:
    outcomes = ranks.run(train_on_ranks, size, fields, tmp_path, checkpoint_of_one)
    outcomes.append(finish(checkpoints.latest(tmp_path), OneProcess(torch.device("cpu"))))
    for losses, held_out, norms, isolation in outcomes:
        assert losses == pytest.approx(alone[0], rel=1e-5)
        assert held_out == pytest.approx(alone[1], rel=1e-5)
        assert norms == pytest.approx(alone[2], rel=1e-4)
        assert isolation == alone[3]


def find(options: str, rows_per_step: int) -> OneProcess:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return find_ranks(parser.parse_args(options.split(), argparse.Namespace(device="cpu")), rows_per_step)


@pytest.mark.parametrize(
    ("options", "rows_per_step", "axes"),
    [
        ("", 12, (6, 1, 1, 1)),
        ("", 2, (1, 1, 6, 1)),
        ("--model-axis-size 2 --fsdp-axis-size -1", 3, (1, 3, 1, 2)),
        ("--data-axis-size 3 --context-axis-size 2", 3, (3, 1, 2, 1)),
        (
            "--model-axis-size 2",
            3,
            "expected axes whose sizes make 6 ranks, got .*data_axis_size 1.*model_axis_size 2",
        ),
        ("--fsdp-axis-size 0 --data-axis-size 6", 6, "fsdp_axis_size: expected -1 .* or a positive integer, got 0"),
        ("--data-axis-size 3 --fsdp-axis-size 2", 3, "--rows-per-step: expected a multiple of the 6 ranks .*, got 3"),
    ],
)
def test_options_make_the_axes(
    options: str, rows_per_step: int, axes: tuple[int, ...] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")

    def check() -> None:
        if isinstance(axes, str):
            with pytest.raises(SystemExit, match=axes):
                find(options, rows_per_step)
        else:
            sizes = re.findall(r"(\w+)_axis_size (\d+)", find(options, rows_per_step).description)
            assert sizes == list(zip(("data", "fsdp", "context", "model"), map(str, axes), strict=True))

    in_fake_job(6, check)


def test_options_without_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError, match=r"expected a process group, or WORLD_SIZE .*torchrun sets it"):
        find("--context-axis-size 2", 4)
    assert find("", 1).description == ""
