"""One layer attends to the pairs of transformers' own dense mask, wherever queries and keys stand."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from models import difference
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from selfattn.integrations._transformers_mask import create_mask
from selfattn.integrations.transformers import attention_forward

BATCH, HEADS, KV_HEADS, DIM, WINDOW = 2, 4, 2, 16, 5


def _layer(window: int | None) -> nn.Module:
    layer = nn.Module()
    layer.config, layer.is_causal = SimpleNamespace(sliding_window=window), True
    return layer


def _places() -> list[tuple[int, int, int, int]]:
    """Sq, Skv, the place of the first query and of the first key, as the caches of transformers have them."""
    same = [(n, n, 0, 0) for n in (1, 2, 9)]
    grown = [(q, cached + q, cached, 0) for q, cached in itertools.product((1, 4), (1, 7))]
    sliding = [(q, WINDOW - 1 + q, cached, cached - WINDOW + 1) for q, cached in itertools.product((1, 4), (5, 9))]
    static = [(q, 16, cached, 0) for q, cached in itertools.product((1, 2, 7), (0, 1, 9))]
    return same + grown + sliding + static


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("padding", ["none", "left", "right", "between"])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("places", _places(), ids=str)
def test_a_layer_sees_what_the_dense_mask_shows(
    places: tuple[int, int, int, int], window: int | None, padding: str, on_device: bool
) -> None:
    q_length, kv_length, q_offset, kv_offset = places
    total = q_offset + q_length
    q = torch.randn(BATCH, HEADS, q_length, DIM, requires_grad=True)
    k, v = (torch.randn(BATCH, KV_HEADS, kv_length, DIM, requires_grad=True) for _ in range(2))
    real = torch.ones(BATCH, total, dtype=torch.bool)
    gap = {"none": slice(0, 0), "left": slice(0, total // 2), "right": slice(total - 1, total), "between": slice(1, 2)}
    real[1, gap[padding]] = False
    arguments = {
        "batch_size": BATCH,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": torch.tensor(q_offset) if on_device else q_offset,
        "kv_offset": kv_offset,
        "mask_function": causal_mask_function if window is None else sliding_window_causal_mask_function(window),
        "attention_mask": None if padding == "none" else real,
    }
    layer = _layer(window)
    mask = create_mask(**arguments, local_size=window, config=layer.config)
    positions = (real.cumsum(1) - 1).masked_fill(~real, 0)[:, q_offset:]
    given, _ = attention_forward(layer, q, k, v, mask, scaling=0.4, sliding_window=window, position_ids=positions)

    dense = sdpa_mask(**arguments, allow_is_causal_skip=False)
    dense = dense & real[:, None, q_offset:, None]  # the row of a padding query is empty
    expected = _attention(q, k, v, dense)
    seen = dense.any(-1)[:, 0]  # eager has no meaning for a query without a key
    weight = torch.randn(expected.shape) * seen[..., None, None]
    assert difference(given[seen], expected[seen]) < 1e-5
    gradients, expected_gradients = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (given, expected))
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5)


def _attention(q: Tensor, k: Tensor, v: Tensor, dense: Tensor) -> Tensor:
    k, v = (heads.repeat_interleave(HEADS // KV_HEADS, 1) for heads in (k, v))
    logits = (0.4 * q @ k.transpose(2, 3)).masked_fill(~dense, -1e30)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def test_positions_that_change_in_place_are_seen() -> None:
    """The ids are kept with the mask for the layers that follow, as long as nothing changes."""
    layer = _layer(None)
    q, k, v = (torch.randn(1, 4, 8, DIM) for _ in range(3))
    mask = create_mask(batch_size=1, q_length=8, kv_length=8)
    positions = torch.arange(8)[None].clone()
    whole, _ = attention_forward(layer, q, k, v, mask, position_ids=positions)
    again, _ = attention_forward(layer, q, k, v, mask, position_ids=positions)
    assert torch.equal(whole, again)
    positions.copy_(torch.arange(4).repeat(2)[None])
    packed, _ = attention_forward(layer, q, k, v, mask, position_ids=positions)
    other, _ = attention_forward(
        layer, q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], mask[:, :, :, 4:], position_ids=positions[:, 4:]
    )
    assert difference(packed[:, 4:], other) < 1e-5
    assert difference(whole[:, 4:], other) > 0.1
