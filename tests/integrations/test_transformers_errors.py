"""What cannot be served raises an error that says what was expected, and never attends to everything in silence."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from models import build, difference, tokens
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_chunked_causal_mask,
)

from selfattn.integrations.transformers import attention_forward

LENGTHS = [7, 12, 1, 9]
TOTAL = sum(LENGTHS)


def _embeddings(length: int = 8) -> torch.Tensor:
    return torch.zeros(2, length, 64)


def _layer(**attributes) -> torch.nn.Module:
    layer = build("llama").model.layers[0].self_attn
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def _heads(length: int = 8) -> list[torch.Tensor]:
    return [torch.randn(2, 4, length, 16) for _ in range(3)]


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_a_dense_mask(dtype: torch.dtype) -> None:
    mask = torch.ones(2, 1, 8, 8, dtype=dtype).tril()
    with pytest.raises(NotImplementedError, match=r"attention_mask must be None or \(B, S\).*\(2, 1, 8, 8\)"):
        build("llama")(tokens(2, 8), attention_mask=mask)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("which", ["or_mask_function", "and_mask_function"])
def test_a_mask_function_of_the_caller(which: str, compiled: bool) -> None:
    config = build("llama").config

    def run() -> torch.Tensor:
        added = {which: lambda batch, head, query, key: key >= query - 3}
        return create_causal_mask(config, _embeddings(), None, None, **added)

    with pytest.raises(Exception, match="cannot serve a mask function of the caller"):
        (torch.compile(run, backend="eager", fullgraph=True) if compiled else run)()


@pytest.mark.parametrize("padded_too", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_that_see_both_ways(compiled: bool, padded_too: bool) -> None:
    config = build("llama").config
    blocks = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1]] * 2)
    mask = torch.ones(2, 8) if padded_too else None
    positions = torch.arange(8)[None]

    def run() -> torch.Tensor:
        return create_causal_mask(config, _embeddings(), mask, None, positions, block_sequence_ids=blocks)

    with pytest.raises(Exception, match=r"cannot serve|later key, which cannot be served"):
        (torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)()


@pytest.mark.parametrize("compiled", [False, True])
def test_chunks(compiled: bool) -> None:
    config = build("llama").config
    config.attention_chunk_size = config.sliding_window = 4

    def run() -> torch.Tensor:
        return create_chunked_causal_mask(config, _embeddings(), None, None)

    with pytest.raises(Exception, match="cannot serve"):
        (torch.compile(run, backend="eager", fullgraph=True) if compiled else run)()


def test_llama_4() -> None:
    config = hf.Llama4TextConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        intermediate_size_mlp=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        attention_chunk_size=4,
        pad_token_id=0,
        layer_types=["chunked_attention", "full_attention"],
    )
    config._attn_implementation = "selfattn"
    with pytest.raises(NotImplementedError, match="cannot serve the mask function 'chunked_overlay"):
        hf.Llama4ForCausalLM(config)(tokens(1, 8))


@pytest.mark.parametrize("padded_too", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("create", [create_bidirectional_mask, create_bidirectional_sliding_window_mask])
def test_both_directions(create: Callable, compiled: bool, padded_too: bool) -> None:
    config = build("mistral").config
    mask = torch.ones(2, 8) if padded_too else None

    def run() -> torch.Tensor:
        return create(config, _embeddings(), mask)

    with pytest.raises(Exception, match="cannot serve attention in both directions"):
        (torch.compile(run, backend="eager", fullgraph=True) if compiled else run)()


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_decoder_turned_into_an_encoder(name: str) -> None:
    model = build(name)
    model.config.is_causal = False
    with pytest.raises(NotImplementedError, match="cannot serve"):
        model(tokens(1, 8))
    with pytest.raises(NotImplementedError, match="cannot serve"):
        build(name)(tokens(1, 8), is_causal=False)


def test_a_layer_that_is_not_causal_with_a_causal_mask() -> None:
    mask, positions = create_causal_mask(build("llama").config, _embeddings(), None, None), torch.arange(8)[None]
    for layer, options in ((_layer(is_causal=False), {}), (_layer(), {"is_causal": False})):
        with pytest.raises(NotImplementedError, match="LlamaAttention is not causal, but came with a causal mask"):
            attention_forward(layer, *_heads(), mask, position_ids=positions, **options)


def test_an_encoder() -> None:
    config = hf.BertConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    config._attn_implementation = "selfattn"
    with pytest.raises(NotImplementedError, match="cannot serve"):
        hf.BertModel(config).eval()(tokens(1, 8), attention_mask=torch.ones(1, 8))


def test_a_window_that_the_configuration_does_not_name() -> None:
    config = build("mistral").config
    mask_function = hf.masking_utils.sliding_window_causal_mask_function(7)
    create = hf.AttentionMaskInterface()["selfattn"]
    with pytest.raises(NotImplementedError, match=r"a window of 7 where config\.sliding_window is 5"):
        create(batch_size=1, q_length=8, kv_length=8, mask_function=mask_function, local_size=7, config=config)


def test_a_layer_and_a_mask_with_other_windows() -> None:
    model = build("llama")
    mask = create_causal_mask(model.config, _embeddings(), None, None)
    with pytest.raises(NotImplementedError, match="asks for a window of 3, its mask for None"):
        attention_forward(_layer(), *_heads(), mask, sliding_window=3, position_ids=torch.arange(8)[None])


def test_a_causal_layer_without_a_mask() -> None:
    with pytest.raises(NotImplementedError, match="came without a mask"):
        attention_forward(_layer(), *_heads(), None, position_ids=torch.arange(8)[None])


def test_a_mask_for_other_keys() -> None:
    mask = create_causal_mask(build("llama").config, _embeddings(9), None, None)
    with pytest.raises(ValueError, match="made for 2 rows of 9 keys, the layer came with 2 of 8"):
        attention_forward(_layer(), *_heads(), mask, position_ids=torch.arange(8)[None])


def test_queries_beyond_the_keys() -> None:
    create = hf.AttentionMaskInterface()["selfattn"]
    with pytest.raises(ValueError, match="the last of 3 queries stands at key 8, beyond the 8 keys"):
        create(batch_size=1, q_length=3, kv_length=8, q_offset=6)


# ---------------------------------------------------------------- documents


@pytest.mark.parametrize("name", ["segment_ids", "seq_idx"])
@pytest.mark.parametrize("shape", [(TOTAL,), (1, TOTAL - 1), (3, TOTAL), (1, 1, TOTAL)])
def test_ids_of_another_shape(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"{name} must name the documents of all keys, \(2, {TOTAL}\)"):
        build("llama")(tokens(2, TOTAL), **{name: torch.zeros(shape, dtype=torch.int32)})


def test_cumulative_lengths_of_two_rows() -> None:
    cumulative = torch.tensor([0, 7, TOTAL], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q must be .* for a batch of one row"):
        build("llama")(tokens(2, TOTAL), cu_seq_lens_q=cumulative)


def test_cumulative_lengths_of_the_keys_alone() -> None:
    cumulative = torch.tensor([0, 7, TOTAL], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_k must be the same as cu_seq_lens_q"):
        build("llama")(tokens(1, TOTAL), cu_seq_lens_k=cumulative)
    with pytest.raises(ValueError, match="cu_seq_lens_k must be the same as cu_seq_lens_q"):
        build("llama")(tokens(1, TOTAL), cu_seq_lens_q=cumulative, cu_seq_lens_k=cumulative[:2])


def test_positions_of_three_axes() -> None:
    model, positions = build("llama"), torch.arange(8).expand(3, 1, 8)
    mask = create_causal_mask(model.config, _embeddings(), None, None)
    with pytest.raises(ValueError, match=r"position_ids must be \(1 \| 2, 8\).*\(3, 1, 8\)"):
        attention_forward(_layer(), *_heads(), mask, position_ids=positions)
    ids = torch.zeros(1, 8, dtype=torch.int32)  # they need not be understood where the documents are named
    attention_forward(_layer(), *_heads(), mask, position_ids=positions, segment_ids=ids)


def test_no_positions_at_all() -> None:
    config, (q, k, v) = build("llama").config, _heads()
    cache = StaticCache(config=config, max_cache_len=8)
    cache.early_initialization(2, 2, 16, torch.float32, "cpu")
    for length, cached in ((8, None), (1, cache), (2, cache)):
        mask = create_causal_mask(config, _embeddings(length), None, cached)
        with pytest.raises(ValueError, match="hands no position_ids to its attention"):
            attention_forward(_layer(), q[:, :, :length], k, v, mask)


@pytest.mark.parametrize("name", ["segment_ids", "seq_idx", "cu_seq_lens_q"])
def test_documents_of_the_new_tokens_alone_with_a_filled_cache(name: str) -> None:
    model = build("llama")
    given = torch.tensor([0, 4]) if name == "cu_seq_lens_q" else torch.zeros(1, 4)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        model(tokens(1, 8), cache=cache)
        with pytest.raises(ValueError, match=f"{name} must name the documents of all keys.*from a cache"):
            model(tokens(1, 4), cache=cache, **{name: given.int()})


@pytest.mark.parametrize("static", [False, True])
def test_documents_of_all_keys_with_a_filled_cache_are_served(static: bool) -> None:
    model, row = build("llama"), tokens(1, 12)
    ids = torch.tensor([[4, 4, 4, 4, 4, 9, 9, 9, 9, 4, 4, 9]])  # in any order
    length = 16 if static else 0
    with torch.no_grad():
        expected = model(row, segment_ids=ids).logits[:, 8:]
        cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
        model(row[:, :8], segment_ids=ids[:, :8], cache=cache)
        given = []
        for part in (row[:, 8:10], row[:, 10:11], row[:, 11:]):
            filled = cache.get_seq_length() + part.shape[1]
            known = torch.nn.functional.pad(ids[:, :filled], (0, max(0, length - filled)), value=4)
            given.append(model(part, segment_ids=known, cache=cache).logits)
    assert difference(torch.cat(given, 1), expected) < 2e-5


# ---------------------------------------------------------------- options


def test_dropout() -> None:
    model = build("llama", attention_dropout=0.1)
    model(tokens(1, 8))  # none in evaluation
    with pytest.raises(NotImplementedError, match=r"dropout must be 0, came as 0.1"):
        model.train()(tokens(1, 8))


def test_weights_as_an_output() -> None:
    with pytest.raises((NotImplementedError, ValueError), match="output_attentions"):
        build("llama")(tokens(1, 8), output_attentions=True)


@pytest.mark.parametrize("name", ["position_bias", "attention_bias", "indices", "block_indices", "sinks"])
def test_another_attention(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"comes with {name}, which cannot be served"):
        build("llama")(tokens(1, 8), **{name: torch.zeros(1, 4, 8, 8)})


# ---------------------------------------------------------------- what is served without a mask


def test_a_tower_that_sees_both_ways() -> None:
    q, k, v = _heads()
    out, weights = attention_forward(_layer(is_causal=False), q, k, v, None, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)
    assert weights is None
    assert difference(out, expected) < 1e-5


def test_importing_selfattn_imports_no_transformers() -> None:
    program = "import sys, selfattn; assert not {'transformers', 'selfattn.integrations'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
