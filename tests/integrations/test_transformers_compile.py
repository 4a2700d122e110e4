"""torch.compile in one graph, and without a new graph for every length of a static cache."""

import pytest
import torch
from models import NAMES, build, difference, padded, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, StaticCache

LENGTHS = [7, 12, 1, 9]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def _graphs(counter: CompileCounterWithBackend) -> int:
    return sum(len(module.graph.nodes) > 0 for module in counter.graphs)  # an empty one may come first


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


def test_rows_of_other_lengths_need_no_graph_each() -> None:
    model, counter = build("qwen2_sliding", layers=2), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for lengths in ([7, 12], [9, 9, 11], [30], [2, 14]):
            row = tokens(1, sum(lengths))
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            expected = model(row, position_ids=positions, use_cache=False).logits
            given = compiled(row, position_ids=positions, use_cache=False).logits
            assert difference(given, expected) < 2e-5
    assert _graphs(counter) == 1


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "smollm3"])
def test_generation_compiles_its_steps(name: str) -> None:
    rows = padded([9, 4], "left")
    configuration = CompileConfig(backend="aot_eager", fullgraph=True)
    configuration._compile_all_devices = True  # transformers leaves the CPU out
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = build(name, "eager", layers=2).generate(**rows, **options)
    given = build(name, layers=2).generate(
        **rows, **options, cache_implementation="static", compile_config=configuration
    )
    assert torch.equal(given.sequences, expected.sequences)
    assert difference(torch.stack(given.logits), torch.stack(expected.logits)) < 2e-5


@pytest.mark.parametrize("name", ["llama", "glm4"])
def test_decoding_with_a_static_cache_is_one_graph_for_all_steps(name: str) -> None:
    """The mask is made inside the graph, from a length that stands on the device."""
    row = tokens(2, 14)
    model, counter = build(name, layers=2), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        expected = build(name, "eager", layers=2)(row, use_cache=False).logits[:, 9:]
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(row[:, :9], cache=cache)
        steps = [
            compiled(row[:, i : i + 1], cache=cache, position_ids=torch.full((1, 1), i)).logits for i in range(9, 14)
        ]
    assert difference(torch.cat(steps, 1), expected) < 2e-5
    assert _graphs(counter) == 1


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
