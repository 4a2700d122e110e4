"""The demo's own checks pass for what they promise, and fail for a model that breaks the promise."""

import pytest
import torch
from checks import check_isolation, most_crowded
from demo import make_trainer
from dense_mask import DenseMaskModel
from packing import pack
from side_by_side import compare_steps
from support.tiny_plan import CPU, PLAN
from torch import Tensor
from training import loss_in_bits

ROWS = pack([bytes([97 + n % 26]) * (3 + n % 7) for n in range(40)], 32, seed=0)


@pytest.fixture
def model() -> torch.nn.Module:
    model = make_trainer(PLAN, ROWS, CPU).model
    torch.nn.init.normal_(model.head.weight)  # zero in a new model
    return model


def test_isolation_holds_for_segment_ids(model: torch.nn.Module) -> None:
    isolation = check_isolation(model, most_crowded(ROWS, 3), CPU)
    assert isolation.holds and isolation.documents_changed >= 9


def test_isolation_fails_without_segment_ids(model: torch.nn.Module) -> None:
    isolation = check_isolation(lambda tokens, ids, positions, context: model(tokens, None, positions), ROWS, CPU)
    assert isolation.others_changed_too > 0 and not isolation.holds


def test_isolation_fails_for_a_model_that_ignores_its_input(model: torch.nn.Module) -> None:
    def ignorant(tokens: Tensor, *others: Tensor, context: None) -> Tensor:
        return model(torch.zeros_like(tokens), *others)

    isolation = check_isolation(ignorant, ROWS, CPU)
    assert isolation.unmoved_by_own_change > 0 and not isolation.holds


def test_isolation_needs_rows_of_several_documents(model: torch.nn.Module) -> None:
    alone = pack([b"x" * 31], 32, seed=0)
    assert not check_isolation(model, alone, CPU).holds


def test_dense_mask_computes_the_same_loss_and_gradients(model: torch.nn.Module) -> None:
    dense = DenseMaskModel(model)
    losses = [loss_in_bits(each, ROWS, ROWS.count_targets()) for each in (model, dense)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(model.embedding.weight.grad, dense.model.embedding.weight.grad, rtol=1e-3, atol=1e-6)


def test_comparison_counts_the_mask(model: torch.nn.Module) -> None:
    comparison = compare_steps(model, ROWS[:2], repeats=2)
    assert comparison.dense_mask_bytes == 2 * 32 * 32
    assert comparison.loss_difference < 1e-5
    assert comparison.segment_ids_seconds > 0 and comparison.dense_mask_seconds > 0
