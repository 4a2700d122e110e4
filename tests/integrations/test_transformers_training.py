"""Training: gradient checkpointing, a few steps beside eager, adapters' hooks left alone."""

import pytest
import torch
from models import build, difference, every_model, tokens
from torch import Tensor

LENGTHS = [7, 12, 1, 9]


def _batch() -> dict[str, Tensor]:
    row = tokens(1, sum(LENGTHS))
    return {"input_ids": row, "labels": row, "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}


def _gradients(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.train()(**batch).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_model
def test_checkpointing_gives_the_same_gradients(name: str, use_reentrant: bool) -> None:
    batch = _batch()
    expected = _gradients(build(name), batch)
    model = build(name)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    gradients = _gradients(model, batch)
    assert gradients.keys() == expected.keys()
    for weight, gradient in gradients.items():
        assert difference(gradient, expected[weight]) < 1e-5, weight


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_few_steps_follow_eager_on_the_documents_alone(name: str) -> None:
    packed, alone = build(name), build(name, "eager")
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.02) for model in (packed, alone)]
    weights = torch.tensor(LENGTHS).sub(1) / (sum(LENGTHS) - len(LENGTHS))
    for _ in range(4):
        batch = _batch()
        starts = batch["position_ids"] == 0
        loss = packed(**{**batch, "labels": batch["labels"].masked_fill(starts, -100)}).loss
        documents = batch["input_ids"].split(LENGTHS, 1)
        expected = sum(
            weight * alone(document, labels=document).loss
            for document, weight in zip(documents, weights, strict=True)
            if document.shape[1] > 1
        )
        assert difference(loss, expected) < 1e-4
        for optimiser, value in zip(optimisers, (loss, expected), strict=True):
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
