"""Static caches are read where they lie, up to their length, by the operator over a KV cache."""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from models import WINDOW, build, difference, padded, tokens
from torch import Tensor
from transformers import StaticCache
from transformers.masking_utils import create_causal_mask

import selfattn
from selfattn.integrations import transformers as adapter
from selfattn.integrations._transformers_documents import interval

SLOTS = 64


def _filled(model: torch.nn.Module, row: Tensor, slots: int = SLOTS, **options) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=slots)
    with torch.no_grad():
        model(row, cache=cache, **options)
    return cache


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple]]:
    """The names and arguments of the operators that the adapter calls."""
    found = []

    def recorded(name: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            found.append((name, arguments))
            return function(*arguments, **options)

        return call

    for name in ("attention_with_kv_cache", "multihead_attention"):
        monkeypatch.setattr(adapter, name, recorded(name, getattr(adapter, name)))
    return found


# ---------------------------------------------------------------- the mask


@pytest.mark.parametrize("q_length", [1, 4, 32])
def test_the_mask_is_a_length_on_the_device(q_length: int) -> None:
    model = build("llama", layers=2)
    cache = _filled(model, tokens(3, 7))
    mask = create_causal_mask(model.config, torch.zeros(3, q_length, 64), None, cache)
    assert mask.shape[-1] == SLOTS and mask.dtype == torch.int32
    assert mask.untyped_storage().nbytes() == 4  # one number
    assert mask.unique().tolist() == [7 + q_length]
    cache.layers[0].cumulative_length.add_(1)  # as update does, after the mask and before the layer
    assert mask.unique().tolist() == [7 + q_length]


def test_masks_of_other_queries_have_a_number_a_key() -> None:
    model = build("llama", layers=2)
    cache = _filled(model, tokens(3, 7))
    for q_length, padding in ((33, None), (1, torch.ones(3, 8)), (4, torch.ones(3, 11))):
        mask = create_causal_mask(model.config, torch.zeros(3, q_length, 64), padding, cache)
        assert mask.numel() <= 3 * SLOTS * 5  # (B, Skv) and a few facts: never Sq times Skv


def test_the_mask_of_a_sliding_layer_keeps_its_shape() -> None:
    """As compiled decoding needs: while its cache fills up, and from then on."""
    model = build("mistral", layers=2)
    cache = StaticCache(config=model.config, max_cache_len=SLOTS)
    shapes, step = set(), tokens(1, 1)
    with torch.no_grad():
        for i in range(WINDOW + 3):
            mask = hf.masking_utils.create_sliding_window_causal_mask(
                model.config, torch.zeros(1, 1, 64), None, cache, position_ids=torch.tensor([[i]])
            )
            shapes.add(mask.shape)
            model(step, cache=cache)
    assert len(shapes) == 1


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("q_length", [1, 2])
def test_a_step_reads_the_cache_where_it_lies(name: str, q_length: int, calls: list) -> None:
    model = build(name, layers=2)
    cache = _filled(model, tokens(2, 2))
    calls.clear()
    with torch.no_grad():
        model(tokens(2, q_length), cache=cache)
    assert [called for called, _ in calls] == ["attention_with_kv_cache"] * 2
    for (_, arguments), layer in zip(calls, cache.layers, strict=True):
        for given, kept in zip(arguments[1:3], (layer.keys, layer.values), strict=True):
            assert given.data_ptr() == kept.data_ptr()
            assert given.stride() == kept.transpose(1, 2).stride()
        assert arguments[3].tolist() == [2 + q_length] * 2


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("q_length", [1, 5])
def test_what_is_not_written_is_not_read(name: str, q_length: int) -> None:
    model, row, step = build(name, layers=2), tokens(2, 4), tokens(2, q_length)
    with torch.no_grad():
        clean = model(step, cache=_filled(model, row)).logits
        cache = _filled(model, row)
        for layer in cache.layers:
            layer.keys[:, :, 4:] = layer.values[:, :, 4:] = float("nan")
        assert torch.equal(model(step, cache=cache).logits, clean)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_batch_with_padding_reads_its_cache_where_it_lies(name: str, calls: list) -> None:
    """Rows that are padded on the left, by their first slots; each row in one of two calls, the other one is empty."""
    model, eager, rows = build(name, layers=2), build(name, "eager", layers=2), padded([9, 4], "left")
    step, mask = tokens(2, 1), torch.cat([rows["attention_mask"], torch.ones(2, 1)], 1)
    position = mask.sum(1, keepdim=True).long() - 1
    logits = []
    for any_model in (eager, model):
        positions = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
        cache = _filled(any_model, rows["input_ids"], attention_mask=rows["attention_mask"], position_ids=positions)
        calls.clear()
        with torch.no_grad():
            logits.append(any_model(step, cache=cache, attention_mask=mask, position_ids=position).logits)
    assert difference(logits[1], logits[0]) < 2e-5
    cached = dict(calls)["attention_with_kv_cache"]  # the last one: the full layer of both models
    assert cached[1].data_ptr() == cache.layers[1].keys.data_ptr()
    assert (cached[3] > 0).all()


def test_interval_of_keys() -> None:
    keys = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]) - 1
    first, lengths, rest = interval(keys)
    assert first[:2, 0].tolist() == [0, 1]
    assert lengths.tolist() == [3, 4, 0, 0, 5]
    assert rest.tolist() == [[-1] * 5, [-1] * 5, [-1, 0, -1, 0, -1], [-1] * 5, [-1] * 5]


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize("parts", [[3, 32, 5], [4, 33, 3], [1, 1, 38]], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_many_new_tokens_at_once(name: str, parts: list[int]) -> None:
    """Up to 32 are drafts, more are laid into a square."""
    model, row = build(name, layers=2), tokens(2, 40)
    cache = StaticCache(config=model.config, max_cache_len=SLOTS)
    with torch.no_grad():
        expected = build(name, "eager", layers=2)(row, use_cache=False).logits
        given = torch.cat([model(part, cache=cache).logits for part in row.split(parts, 1)], 1)
    assert difference(given, expected) < 2e-5


def test_a_document_that_begins_among_new_tokens() -> None:
    """Positions that start again, as packing gives them, and a step that goes on with the last one."""
    model, row = build("llama", layers=2), tokens(1, 14)
    positions = torch.cat([torch.arange(6), torch.arange(5), torch.arange(3)])[None]
    cache = StaticCache(config=model.config, max_cache_len=SLOTS)
    with torch.no_grad():
        alone = build("llama", "eager", layers=2)
        expected = torch.cat([alone(part, use_cache=False).logits for part in row.split([6, 5, 3], 1)], 1)
        given = [
            model(part, cache=cache, position_ids=where).logits
            for part, where in zip(row.split([4, 8, 1, 1], 1), positions.split([4, 8, 1, 1], 1), strict=True)
        ]
    assert difference(torch.cat(given, 1), expected) < 2e-5


def test_compiled_steps_across_the_window() -> None:
    torch._dynamo.reset()
    row = tokens(2, WINDOW + 4)
    model = build("gemma2", layers=2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = build("gemma2", "eager", layers=2)(row, use_cache=False).logits[:, 2:]
        cache = _filled(model, row[:, :2])
        steps = [
            compiled(row[:, i : i + 1], cache=cache, position_ids=torch.full((1, 1), i)).logits
            for i in range(2, row.shape[1])
        ]
    assert difference(torch.cat(steps, 1), expected) < 2e-5


# ---------------------------------------------------------------- StaticKVCache


def test_a_layer_goes_on_from_the_cache_of_a_model() -> None:
    model, row = build("llama", layers=2), tokens(2, 7)
    static = _filled(model, row)
    theirs, module = copy.deepcopy(static), model.model.layers[1].self_attn
    layer = selfattn.SelfAttention.from_pretrained_layer(module)
    x = torch.randn(2, 1, 64)
    with torch.no_grad():
        tables = model.model.rotary_emb(x, torch.full((2, 1), 7))
        mask = create_causal_mask(model.config, x, None, theirs)
        expected, _ = module(
            x, position_embeddings=tables, attention_mask=mask, cache=theirs, position_ids=torch.full((2, 1), 7)
        )
        cache = adapter.StaticKVCache(static)
        given = layer(x, cache=cache.layer(1))
        cache.advance(1)
    assert difference(given, expected) < 1e-5
    assert difference(static.layers[1].keys, theirs.layers[1].keys) < 1e-5
    assert static.get_seq_length() == 8 and cache.lengths.tolist() == [8, 8]
    assert cache.capacity == SLOTS


def test_the_wrapper_reorders_in_place_and_follows_transformers() -> None:
    static = _filled(build("llama", layers=2), tokens(3, 7))
    cache, before = adapter.StaticKVCache(static), static.layers[0].keys.clone()
    memory = static.layers[0].keys.data_ptr()
    cache.reorder([2, 2, 0])
    assert static.layers[0].keys.data_ptr() == memory
    assert torch.equal(static.layers[0].keys, before[[2, 2, 0]])
    static.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.layer(0).keys.data_ptr() == static.layers[0].keys.data_ptr()
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0] and static.get_seq_length() == 0


def test_caches_that_cannot_be_wrapped() -> None:
    config = build("llama", layers=2).config
    with pytest.raises(TypeError, match="expected a StaticCache, got DynamicCache"):
        adapter.StaticKVCache(hf.DynamicCache(config=config))
    with pytest.raises(ValueError, match="expected one with memory"):
        adapter.StaticKVCache(StaticCache(config=config, max_cache_len=SLOTS))
    with pytest.raises(NotImplementedError, match="got a StaticSlidingWindowLayer at layer 0"):
        adapter.StaticKVCache(_filled(build("gemma2", layers=2), tokens(1, 3)))
    cache = adapter.StaticKVCache(_filled(build("llama", layers=2), tokens(3, 7)))
    for call, message in (
        (lambda: cache.advance(torch.ones(3)), r"expected one number.*\(3,\)"),
        (lambda: cache.reset([1]), "rows: expected None"),
        (lambda: cache.reorder([1]), r"one for each of 3 rows, got shape \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
