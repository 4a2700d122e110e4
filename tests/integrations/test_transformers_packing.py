"""A packed row gives each document what it gets alone, however the documents are named.

Never compared with eager on the packed row: with a cache or an attention mask, eager drops the packing.
"""

from collections.abc import Callable

import pytest
import torch
from models import PAD, build, difference, every_model, tokens
from torch import Tensor
from transformers import DataCollatorWithFlattening

LENGTHS = [7, 12, 1, 9]
TOTAL = sum(LENGTHS)


def _positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def _ids(lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


# How documents are named. Without position_ids the model counts through the row; rotation is relative, so it may.
NAMINGS: dict[str, Callable[[list[int]], dict[str, Tensor]]] = {
    "position_ids": lambda lengths: {"position_ids": _positions(lengths)},
    "segment_ids": lambda lengths: {"segment_ids": _ids(lengths), "position_ids": _positions(lengths)},
    "segment_ids alone": lambda lengths: {"segment_ids": _ids(lengths).int()},
    "seq_idx": lambda lengths: {"seq_idx": _ids(lengths).int(), "position_ids": _positions(lengths)},
    "cu_seq_lens": lambda lengths: {
        "cu_seq_lens_q": _cumulative(lengths),
        "cu_seq_lens_k": _cumulative(lengths),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    },
}
every_naming = pytest.mark.parametrize("naming", NAMINGS)


def _alone(name: str, row: Tensor, lengths: list[int]) -> Tensor:
    model = build(name, "eager")
    return torch.cat([model(document, use_cache=False).logits for document in row.split(lengths, 1)], 1)


@every_naming
@every_model
def test_logits_are_those_of_each_document_alone(name: str, naming: str) -> None:
    row = tokens(1, TOTAL)
    with torch.no_grad():
        expected = _alone(name, row, LENGTHS)
        model = build(name)
        # Keys come back from a cache, or the attention mask is all ones: both switch off transformers' own detection.
        for options in ({"use_cache": False}, {"use_cache": True}, {"attention_mask": torch.ones(1, TOTAL)}):
            given = model(row, **NAMINGS[naming](LENGTHS), **options).logits
            assert difference(given, expected) < 2e-5, options


@pytest.mark.parametrize("naming", ["position_ids", "cu_seq_lens"])
@every_model
def test_gradients_are_those_of_the_documents_alone(name: str, naming: str) -> None:
    row = tokens(1, TOTAL)
    weight = torch.randn(1, TOTAL, 97)
    alone, packed = build(name, "eager"), build(name)
    for document, part in zip(row.split(LENGTHS, 1), weight.split(LENGTHS, 1), strict=True):
        (alone(document, use_cache=False).logits * part).sum().backward()
    (packed(row, **NAMINGS[naming](LENGTHS)).logits * weight).sum().backward()
    expected = dict(alone.named_parameters())
    for parameter_name, parameter in packed.named_parameters():
        if parameter.grad is not None:
            assert difference(parameter.grad, expected[parameter_name].grad) < 2e-4, parameter_name


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_rows_of_a_batch_are_packed_in_their_own_ways(name: str) -> None:
    rows, lengths = tokens(3, TOTAL), [LENGTHS, [TOTAL], [3, TOTAL - 3]]
    positions = torch.cat([_positions(each) for each in lengths])
    ids = torch.cat([_ids(each) for each in lengths])
    with torch.no_grad():
        expected = torch.cat([_alone(name, rows[i : i + 1], lengths[i]) for i in range(3)])
        model = build(name)
        assert difference(model(rows, position_ids=positions).logits, expected) < 2e-5
        assert difference(model(rows, segment_ids=ids).logits, expected) < 2e-5


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_one_row_of_names_serves_every_row(name: str) -> None:
    rows = tokens(3, TOTAL)
    with torch.no_grad():
        expected = torch.cat([_alone(name, row[None], LENGTHS) for row in rows])
        for naming in ("position_ids", "segment_ids", "seq_idx"):
            assert difference(build(name)(rows, **NAMINGS[naming](LENGTHS)).logits, expected) < 2e-5


@pytest.mark.parametrize("side", ["left", "right", "between"])
@pytest.mark.parametrize("naming", ["position_ids", "segment_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_padding_lies_over_the_documents(name: str, naming: str, side: str) -> None:
    lengths = {"left": [5, 7, 6], "right": [7, 6, 5], "between": [7, 5, 6]}[side]  # the 5 are padding
    at = lengths.index(5)
    row = tokens(1, 18)
    mask = torch.cat([torch.full((1, length), int(i != at)) for i, length in enumerate(lengths)], 1)
    real = mask.bool()
    with torch.no_grad():
        expected = _alone(name, row, lengths)[real]
        given = build(name)(row.masked_fill(~real, PAD), attention_mask=mask, **NAMINGS[naming](lengths)).logits[real]
    assert difference(given, expected) < 2e-5


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_padding_inside_a_document_does_not_end_it(name: str) -> None:
    row = tokens(1, 12)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1]])
    real = mask.bool()
    positions = (mask.cumsum(1) - 1).masked_fill(~real, 0)  # as generate() counts them
    with torch.no_grad():
        expected = build(name, "eager")(row, attention_mask=mask, position_ids=positions, use_cache=False).logits[real]
        given = build(name)(row, attention_mask=mask, position_ids=positions).logits[real]
    assert difference(given, expected) < 2e-5


def test_segment_ids_come_before_the_other_names() -> None:
    row, model = tokens(1, TOTAL), build("llama")
    other = [TOTAL - 4, 4]
    with torch.no_grad():
        expected = model(row, **NAMINGS["segment_ids"](LENGTHS)).logits
        given = model(
            row,
            segment_ids=_ids(LENGTHS),
            position_ids=_positions(LENGTHS),
            cu_seq_lens_q=_cumulative(other),
            seq_idx=_ids(other),
        ).logits
        assert torch.equal(given, expected)
        given = model(
            row, cu_seq_lens_q=_cumulative(LENGTHS), seq_idx=_ids(other), position_ids=_positions(LENGTHS)
        ).logits
        assert torch.equal(given, expected)


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_oss"])
def test_the_collator_of_transformers(name: str, options: dict[str, bool]) -> None:
    documents = [tokens(length) for length in LENGTHS]
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)([{"input_ids": row} for row in documents])
    model, alone = build(name), build(name, "eager")
    loss = model(**batch).loss
    expected, count = 0.0, 0
    for row in documents:
        if len(row) > 1:
            expected += alone(row[None], labels=row[None]).loss * (len(row) - 1)
            count += len(row) - 1
    assert difference(loss, expected / count) < 1e-5
