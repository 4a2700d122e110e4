"""Over a KV cache, eager and scripted, the model has the logits that it has for whole rows."""

import pytest
import torch
from model import LanguageModel
from packing import VOCABULARY
from support.language_model import make_language_model
from support.problems import error
from torch import Tensor

import selfattn

TOLERANCE = 1e-5
PROMPTS = (5, 1, 9)
LENGTH = 12  # of every sequence in the end


@pytest.fixture
def model() -> LanguageModel:
    return make_language_model()


def new_cache(model: LanguageModel) -> selfattn.KVCache:
    return selfattn.KVCache.dense(
        model.num_layers, len(PROMPTS), LENGTH + 1, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim
    )


def layers_of(cache: selfattn.KVCache) -> list[selfattn.KVCacheLayer]:
    return [cache.layer(i) for i in range(len(cache.keys))]


def tokens_and_logits(model: LanguageModel) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (len(PROMPTS), LENGTH))
    return tokens, model(tokens)


@torch.no_grad()
@pytest.mark.parametrize("is_scripted", (False, True))
def test_ragged_prompts_and_then_a_token_a_step(model: LanguageModel, is_scripted: bool) -> None:
    tokens, expected = tokens_and_logits(model)
    run = torch.jit.script(model) if is_scripted else model
    cache = new_cache(model)
    ids = torch.cat([torch.full((length,), row) for row, length in enumerate(PROMPTS)])[None]
    prompts = torch.cat([tokens[row, :length] for row, length in enumerate(PROMPTS)])[None]
    logits = run(prompts, ids, None, layers_of(cache))
    cache.advance(torch.tensor(PROMPTS))
    wanted = torch.cat([expected[row, :length] for row, length in enumerate(PROMPTS)])
    assert error(logits[0], wanted) < TOLERANCE

    for _ in range(LENGTH - max(PROMPTS)):
        at = cache.lengths.long()
        rows = torch.arange(len(PROMPTS))
        logits = run(tokens[rows, at][:, None], None, None, layers_of(cache))
        cache.advance(1)
        assert error(logits[:, 0], expected[rows, at]) < TOLERANCE


@torch.no_grad()
def test_positions_beside_a_cache_rotate(model: LanguageModel) -> None:
    """Only differences of positions count: those of the slots and others, all moved alike, have the same logits."""
    tokens, expected = tokens_and_logits(model)
    positions = torch.arange(LENGTH).expand(len(PROMPTS), -1)
    moved = model(tokens, None, positions + 3, layers_of(new_cache(model)))
    assert error(moved, expected) < TOLERANCE
    stretched = model(tokens, None, 2 * positions, layers_of(new_cache(model)))
    assert error(stretched, model(tokens, None, 2 * positions)) < TOLERANCE
    assert error(stretched, expected) > 100 * TOLERANCE
