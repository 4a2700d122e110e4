"""An interrupted run that goes on gives the weights and the losses of one that was never interrupted, bit by bit."""

from pathlib import Path

import checkpoints
import pytest
import torch
from demo import make_trainer
from packing import PackedRows, pack
from support.tiny_plan import CPU, PLAN
from training import Plan, Trainer


@pytest.fixture
def rows() -> PackedRows:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 40, (20,), generator=generator).tolist()
    return pack([bytes(torch.randint(97, 123, (n,), generator=generator).tolist()) for n in lengths], 32, seed=0)


def train_to(trainer: Trainer, step: int) -> Trainer:
    while trainer.step < step:
        trainer.train_one_step()
    return trainer


def test_resumed_run_equals_an_uninterrupted_one(rows: PackedRows, tmp_path: Path) -> None:
    whole = train_to(make_trainer(PLAN, rows, CPU), PLAN.steps)
    train_to(make_trainer(PLAN, rows, CPU), 3).save(tmp_path)
    resumed = make_trainer(PLAN, rows, CPU)
    resumed.load(checkpoints.latest(tmp_path))
    assert resumed.step == 3
    train_to(resumed, PLAN.steps)
    assert resumed.history.bits_per_byte == whole.history.bits_per_byte
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_loss_falls(rows: PackedRows) -> None:
    plan = Plan(**{**PLAN.__dict__, "steps": 60, "warmup_steps": 5, "learning_rate": 1e-2})
    history = train_to(make_trainer(plan, rows, CPU), plan.steps).history
    assert sum(history.bits_per_byte[-5:]) / 5 < history.bits_per_byte[0] - 2


def test_checkpoint_of_another_plan_is_refused(rows: PackedRows, tmp_path: Path) -> None:
    make_trainer(PLAN, rows, CPU).save(tmp_path)
    other = Plan(**{**PLAN.__dict__, "steps": 9, "seed": 4})
    with pytest.raises(SystemExit, match=r"another seed, steps. Start anew with --fresh"):
        make_trainer(other, rows, CPU).load(checkpoints.latest(tmp_path))


def test_every_row_is_seen_once_an_epoch(rows: PackedRows) -> None:
    trainer = make_trainer(PLAN, rows, CPU)
    seen = []
    for _ in range(len(rows) // PLAN.rows_per_step):
        seen += trainer._batch().tokens.tolist()
        trainer.step += 1
    assert len(seen) == len({tuple(row) for row in seen})
