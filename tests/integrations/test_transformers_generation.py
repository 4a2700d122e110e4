"""Every step of generation gives eager's logits, with any cache and without one."""

import copy
from pathlib import Path

import pytest
import torch
from models import build, difference, every_model, padded, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

NEW = 9  # more than the window of the sliding layers


def _generate(model: torch.nn.Module, rows: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    result = model.generate(
        **rows,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return result.sequences, torch.stack(result.logits, 1)


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("padding", ["none", "left"])
@every_model
def test_every_step_is_that_of_eager(name: str, padding: str, cache: str) -> None:
    rows = {"input_ids": tokens(2, 11)} if padding == "none" else padded([12, 3, 7], "left")
    options = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}[cache]
    expected_tokens, expected = _generate(build(name, "eager"), rows, **options)
    given_tokens, given = _generate(build(name), rows, **options)
    assert torch.equal(given_tokens, expected_tokens)
    assert difference(given, expected) < 2e-5


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_a_prompt_shorter_than_the_window(name: str) -> None:
    rows = padded([3, 2], "left")
    for options in ({}, {"cache_implementation": "static"}):
        expected = _generate(build(name, "eager"), rows, **options)[1]
        assert difference(_generate(build(name), rows, **options)[1], expected) < 2e-5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_beams(name: str, cache: str) -> None:
    rows = padded([9, 4], "left")
    options = {"num_beams": 3} | ({"cache_implementation": "static"} if cache == "static" else {})
    expected_tokens, expected = _generate(build(name, "eager"), rows, **options)
    given_tokens, given = _generate(build(name), rows, **options)
    assert torch.equal(given_tokens, expected_tokens)
    assert difference(given, expected) < 2e-5


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}], ids=["candidates", "chunks of the prompt"]
)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_several_new_tokens_at_once(name: str, options: dict[str, int]) -> None:
    row = tokens(1, 5).repeat(1, 3)
    expected = build(name, "eager").generate(row, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(build(name).generate(row, max_new_tokens=NEW, do_sample=False, **options), expected)


def _cache(kind: str, model: torch.nn.Module, batch_size: int) -> DynamicCache | StaticCache:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    cache = StaticCache(config=model.config, max_cache_len=32)
    if kind == "static, initialised early":  # the length stands on the device from the start
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache.early_initialization(batch_size, config.num_key_value_heads, head_dim, torch.float32, "cpu")
    return cache


def _in_parts(model: torch.nn.Module, rows: dict[str, Tensor], parts: list[int], cache: object) -> Tensor:
    mask = rows.get("attention_mask")
    logits, done = [], 0
    for part in rows["input_ids"].split(parts, 1):
        done += part.shape[1]
        now = {} if mask is None else {"attention_mask": mask[:, :done]}
        if "position_ids" in rows:
            now["position_ids"] = rows["position_ids"][:, done - part.shape[1] : done]
        logits.append(model(part, cache=cache, use_cache=True, **now).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("kind", ["dynamic", "static", "static, initialised early"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@every_model
def test_a_prompt_in_parts(name: str, padding: str, kind: str) -> None:
    rows = {"input_ids": tokens(2, 17)} if padding == "none" else padded([17, 8, 13], padding)
    real = rows.get("attention_mask", torch.ones_like(rows["input_ids"])).bool()
    with torch.no_grad():
        expected = build(name, "eager")(**rows, use_cache=False).logits[real]
        model = build(name)
        for parts in ([3, 1, 6, 2, 5], [9, 8], [17]):
            cache = _cache(kind, model, len(rows["input_ids"]))
            assert difference(_in_parts(model, rows, parts, cache)[real], expected) < 2e-5, parts


@pytest.mark.parametrize("kind", ["dynamic", "static", "static, initialised early"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "smollm3"])
def test_a_packed_prompt_in_parts_goes_on_with_its_last_document(name: str, kind: str) -> None:
    lengths = [6, 2, 9]
    row = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        alone = build(name, "eager")
        expected = torch.cat([alone(document, use_cache=False).logits for document in row.split(lengths, 1)], 1)
        model = build(name)
        for parts in ([10, 1, 1, 5], [4, 4, 4, 5], [17]):
            for mask in ({}, {"attention_mask": torch.ones(1, 17)}):
                rows = {"input_ids": row, "position_ids": positions, **mask}
                assert difference(_in_parts(model, rows, parts, _cache(kind, model, 1)), expected) < 2e-5, parts


def test_a_right_padded_prompt_goes_on() -> None:
    """The gap of padding stays in the cache, between the prompt and what follows."""
    rows = padded([7, 4], "right")
    mask, follow = rows["attention_mask"], tokens(2, 3)
    positions = torch.stack([torch.arange(7, 10), torch.arange(4, 7)])
    logits = []
    with torch.no_grad():
        for implementation in ("eager", "selfattn"):
            model = build("llama", implementation)
            cache = model(**rows).cache
            long = torch.cat([mask, torch.ones_like(follow)], 1)
            steps = [model(follow, attention_mask=long, position_ids=positions, cache=copy.deepcopy(cache)).logits]
            for i in range(3):
                now = {"attention_mask": long[:, : 8 + i], "position_ids": positions[:, i : i + 1]}
                steps.append(model(follow[:, i : i + 1], cache=cache, **now).logits)
            logits.append(torch.cat(steps, 1))
    assert difference(logits[1], logits[0]) < 2e-5


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_a_saved_model_is_loaded_with_the_name(name: str, tmp_path: Path) -> None:
    rows = padded([12, 3, 7], "left")
    model = build(name, "eager")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="selfattn")
    assert loaded.config._attn_implementation == "selfattn"
    assert difference(_generate(loaded, rows)[1], _generate(model, rows)[1]) < 2e-5
