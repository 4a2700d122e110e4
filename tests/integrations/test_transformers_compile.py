"""torch.compile in one graph, and without a new graph for every length of a static cache."""

import pytest
import torch
from models import NAMES, build, difference, padded, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

LENGTHS = [7, 12, 1, 9]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_training_step_is_one_graph(name: str) -> None:
    row = tokens(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    weight = torch.randn(1, sum(LENGTHS), 97)
    eager, model = build(name, layers=2), build(name, layers=2)
    expected = eager(row, position_ids=positions, use_cache=False).logits
    (expected * weight).sum().backward()
    given = torch.compile(model, backend="aot_eager", fullgraph=True)(
        row, position_ids=positions, use_cache=False
    ).logits
    (given * weight).sum().backward()
    assert difference(given, expected) < 2e-5
    for parameter, other in zip(model.parameters(), eager.parameters(), strict=True):
        if other.grad is not None:
            assert difference(parameter.grad, other.grad) < 2e-4


@pytest.mark.parametrize("name", NAMES)
def test_padded_rows_are_one_graph(name: str) -> None:
    rows = padded([17, 11, 6], "left")
    real = rows["attention_mask"].bool()
    with torch.no_grad():
        expected = build(name, "eager", layers=2)(**rows, use_cache=False).logits[real]
        given = torch.compile(build(name, layers=2), backend="aot_eager", fullgraph=True)(
            **rows, use_cache=False
        ).logits[real]
    assert difference(given, expected) < 2e-5


@pytest.mark.parametrize("name", ["llama", "smollm3", "glm4"])
def test_decoding_with_a_static_cache_is_one_graph_for_all_steps(name: str) -> None:
    rows = padded([9, 4], "left")
    row, mask = rows["input_ids"], rows["attention_mask"]
    step = tokens(2, 5)
    model, counter = build(name, layers=2), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    logits = []
    with torch.no_grad():
        for implementation, decode in (("eager", build(name, "eager", layers=2)), ("selfattn", compiled)):
            cache = StaticCache(config=model.config, max_cache_len=16)
            build(name, implementation, layers=2)(**rows, cache=cache)
            steps = []
            for i in range(step.shape[1]):
                # As generate() does it: the mask of a step is made before the compiled model runs.
                inputs = (model if implementation == "selfattn" else decode).prepare_inputs_for_generation(
                    torch.cat([row, step[:, : i + 1]], 1),
                    next_sequence_length=1,
                    cache=cache,
                    attention_mask=torch.cat([mask, mask.new_ones(2, i + 1)], 1),
                    position_ids=(mask.sum(1, keepdim=True) + i),
                )
                steps.append(decode(**inputs).logits)
            logits.append(torch.cat(steps, 1))
    assert difference(logits[1], logits[0]) < 2e-5
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_inductor(name: str) -> None:
    row = tokens(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    model, eager = build(name, layers=2), build(name, layers=2)
    expected = eager(row, labels=row, position_ids=positions, use_cache=False).loss
    expected.backward()
    given = torch.compile(model, fullgraph=True)(row, labels=row, position_ids=positions, use_cache=False).loss
    given.backward()
    assert difference(given, expected) < 1e-5
    for parameter, other in zip(model.parameters(), eager.parameters(), strict=True):
        if other.grad is not None:
            assert difference(parameter.grad, other.grad) < 2e-4
