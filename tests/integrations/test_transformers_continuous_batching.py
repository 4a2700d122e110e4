"""Continuous batching gives the tokens that each prompt gets alone, from keys in pages."""

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from models import WINDOW, build, difference, tokens
from torch import Tensor
from transformers.generation.continuous_batching import continuous_api

import selfattn.integrations._transformers_paged as paged
from selfattn.integrations.transformers import attention_forward, register

NEW, PAGE = 5, 16
HEADS, KV_HEADS, DIM = 4, 2, 16


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each operator is called by the paged layers."""
    found = Counter()

    def counted(name: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            found[name] += 1
            return function(*arguments, **options)

        return call

    for name in ("append_kv_cache", "attention_with_kv_cache", "multihead_attention"):
        monkeypatch.setattr(paged, name, counted(name, getattr(paged, name)))
    return found


def _generate_batch(model: torch.nn.Module, prompts: list[list[int]], pages: int) -> list[list[int]]:
    outputs = model.generate_batch(
        prompts,
        generation_config=hf.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1),
        continuous_batching_config=hf.ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=16, max_batch_tokens=16, max_blocks_per_request=pages
        ),
        progress_bar=False,
    )
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize(("name", "pages"), [("llama", 0), ("llama", 8), ("qwen3", 8), ("gemma2", 0), ("gpt_oss", 0)])
def test_tokens_are_those_of_each_prompt_alone(name: str, pages: int, calls: Counter[str]) -> None:
    """Prompts longer than a batch come in parts, beside new tokens of others; ``pages`` opens the decode path."""
    prompts = [tokens(length).tolist() for length in (3, 20, 9)]
    eager = build(name, "eager", layers=2)
    expected = [
        eager.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert _generate_batch(build(name, layers=2), prompts, pages) == expected
    assert calls["multihead_attention"] > 0  # prompts alone
    assert calls["attention_with_kv_cache"] > calls["append_kv_cache"]  # earlier keys beside prompts
    assert (calls["append_kv_cache"] > 0) == (pages > 0)


def test_the_name_with_a_prefix_is_the_same() -> None:
    model = build("llama", layers=2)
    with pytest.warns(FutureWarning, match="prefix is no longer needed"):
        model.set_attn_implementation("paged|selfattn")
    assert model.config._attn_implementation == "selfattn"


def test_other_implementations_are_what_they_were() -> None:
    register()
    ask = continuous_api.is_flash_attention_requested
    names = ["selfattn", "flash_attention_2", "sdpa", "paged|eager", "eager"]
    assert [ask(requested_attention_implementation=name) for name in names] == [True, True, False, False, False]
    assert ask(hf.LlamaConfig(attn_implementation="flash_attention_3"), version=[2, 3])


# ---------------------------------------------------------------- one layer


def _layer(window: int | None) -> torch.nn.Module:
    layer = torch.nn.Module()
    kind = "full_attention" if window is None else "sliding_attention"
    layer.config = hf.Qwen3Config(num_hidden_layers=1, layer_types=[kind])
    layer.config.sliding_window, layer.layer_idx = window, 0
    return layer


def _alone(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """(Sq, NH, D): the last query stands at the last key."""
    distance = torch.arange(k.shape[0] - q.shape[0], k.shape[0])[:, None] - torch.arange(k.shape[0])
    seen = (distance >= 0) & (distance < (window or k.shape[0]))
    q, k, v = (heads.transpose(0, 1)[None] for heads in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)[0].transpose(0, 1)


def _cumulative(lengths: list[int], fakes: int = 0) -> Tensor:
    ends = list(itertools.accumulate(lengths))
    return torch.tensor([0, *ends, *ends[-1:] * fakes], dtype=torch.int32)


def _row(parts: list[Tensor], padding: int) -> Tensor:
    """(1, heads, tokens + padding, D), where padding is NaN."""
    row = torch.cat(parts)
    return torch.nn.functional.pad(row, (0, 0, 0, 0, 0, padding), value=float("nan")).transpose(0, 1)[None]


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("earlier", [False, True])
def test_varlen(earlier: bool, window: int | None, padding: int) -> None:
    """Sequences of other numbers of queries and of keys, and a padded row as captured graphs have it."""
    new = [1, 7, 1, 20]
    lengths = [17, 7, 40, 33] if earlier else new
    q = [torch.randn(length, HEADS, DIM) for length in new]
    k, v = ([torch.randn(length, KV_HEADS, DIM) for length in lengths] for _ in range(2))
    out, _ = attention_forward(
        _layer(window),
        _row(q, padding),
        _row(k, padding),
        _row(v, padding),
        None,
        cu_seq_lens_q=_cumulative(new, padding),
        cu_seq_lens_k=_cumulative(lengths, padding),
        sliding_window=window,
        max_length_k=max(lengths),
        write_index=[torch.arange(sum(new))],
        read_index=[torch.arange(sum(lengths) if earlier else 0)],
        block_table=None,
        is_causal=True,
    )
    expected = torch.cat([_alone(*heads, window) for heads in zip(q, k, v, strict=True)])
    assert difference(out[0, : sum(new)], expected) < 1e-5
    assert torch.equal(out[0, sum(new) :], torch.zeros(padding, HEADS, DIM))


def _decode(lengths: list[int], fakes: int, num_queries: int) -> tuple[Tensor, Tensor, Tensor, dict]:
    """New heads, and the pages of a layer that hold the earlier keys, as transformers lays them out."""
    pool = torch.full((8 * PAGE * 2, 2, KV_HEADS, DIM), float("nan"))
    flat = pool.view(-1, PAGE, KV_HEADS, DIM)
    k_cache, v_cache = flat[:-1], flat[1:]  # keys and values of a page stand side by side
    table = torch.full((len(lengths) + fakes, 4), -1, dtype=torch.int32)
    pages = itertools.count(1)
    for row, length in enumerate(lengths):
        for i in range(-(-length // PAGE)):
            table[row, i] = 2 * next(pages)
    kwargs = {
        "cu_seq_lens_q": _cumulative([1] * len(lengths), fakes),
        "cu_seq_lens_k": _cumulative(lengths, fakes),
        "max_length_k": 1,
        "write_index": [],
        "read_index": [],
        "block_table": table,
        "k_cache": k_cache,
        "v_cache": v_cache,
    }
    q, k, v = (torch.randn(1, heads, num_queries, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v, kwargs


@pytest.mark.parametrize("fakes", [0, 3])
def test_decode(fakes: int) -> None:
    lengths = [1, 16, 17, 30]
    q, k, v, kwargs = _decode(lengths, fakes, len(lengths) + fakes)
    expected = []
    for row, length in enumerate(lengths):
        keys, values = (torch.randn(length, KV_HEADS, DIM) for _ in range(2))
        for s in range(length - 1):
            kwargs["k_cache"][kwargs["block_table"][row, s // PAGE], s % PAGE] = keys[s]
            kwargs["v_cache"][kwargs["block_table"][row, s // PAGE], s % PAGE] = values[s]
        keys[-1], values[-1] = k[0, :, row], v[0, :, row]
        expected.append(_alone(q[0, :, row][None], keys, values, None))
    before = kwargs["k_cache"].isfinite().sum()
    out, _ = attention_forward(_layer(None), q, k, v, None, **kwargs)
    assert difference(out[0, : len(lengths)], torch.cat(expected)) < 1e-5
    assert torch.equal(out[0, len(lengths) :], torch.zeros(fakes, HEADS, DIM))
    last = kwargs["k_cache"][kwargs["block_table"][3, 1], 29 % PAGE]
    assert torch.equal(last, k[0, :, 3])
    written = kwargs["k_cache"].isfinite().sum() - before  # of all pages, those of the values among them
    assert written == 2 * len(lengths) * KV_HEADS * DIM


# ---------------------------------------------------------------- errors


def test_more_than_one_token_of_a_sequence_with_a_block_table() -> None:
    q, k, v, kwargs = _decode([1, 16], 0, 3)
    with pytest.raises(ValueError, match="one new token of each sequence, 2, came with 3"):
        attention_forward(_layer(None), q, k, v, None, **kwargs)


def test_a_window_that_the_pages_do_not_have() -> None:
    q, k, v, kwargs = _decode([1, 16], 0, 2)
    with pytest.raises(NotImplementedError, match="asks for a window of 5, its pages are for None"):
        attention_forward(_layer(None), q, k, v, None, sliding_window=5, **kwargs)


def test_a_block_table_outside_of_continuous_batching() -> None:
    with pytest.raises(NotImplementedError, match="comes with block_table"):
        build("llama", layers=1)(tokens(1, 8), block_table=torch.zeros(1, 1))
