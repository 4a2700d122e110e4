"""On the CPU, what a query may not attend to reaches none of its results, whatever bits stand there.

NaN or infinities are put into some tokens. Results of tokens that none of them may reach stay bit by bit; where the
formula over allowed pairs alone, in float64, is not finite, the result is not finite either.
"""

import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support import reference
from support.problems import allowed_pairs, make_ids, make_positions
from torch import Tensor

import selfattn  # noqa: F401  (registers the operators)

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass
class Call:
    """The tensors and options of one call of flash_attention and its backward."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    sinks: Tensor | None = None
    allowed: Tensor = field(init=False)  # (B, Sq, Skv)

    def __post_init__(self) -> None:
        mask = {name: value for name, value in self.options.items() if name not in ("softcap", "qk_scale")}
        self.allowed = allowed_pairs(self.tensors["q"], self.tensors["k"], **mask)[:, 0]

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Results with tokens in the second place."""
        qkv = [tensors[name] for name in "qkv"]
        out, lse = torch.ops.selfattn.flash_attention(*qkv, **self.options, sinks=self.sinks)
        grads = torch.ops.selfattn.flash_attention_backward(
            tensors["grad_out"], tensors.get("grad_lse"), *qkv, out, lse, **self.options
        )
        return dict(zip(NAMES, (out, lse.transpose(1, 2), *grads), strict=True))

    def expected(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The formula over allowed keys only, in float64."""
        leaves = [tensors[name].double().requires_grad_() for name in "qkv"]
        out, lse = reference.attention(*leaves, **self.options, sinks=self.sinks)
        gradients = reference.gradients(out, leaves, tensors["grad_out"])
        if "grad_lse" in tensors and lse.requires_grad:
            of_lse = reference.gradients(lse, leaves, tensors["grad_lse"])
            gradients = [sum(both) for both in zip(gradients, of_lse, strict=True)]
        return dict(zip(NAMES, (out.detach(), lse.detach().transpose(1, 2), *gradients), strict=True))


def padded_ids(rng: random.Random, kind: str, batch: int, length: int) -> Tensor:
    ids = make_ids(kind, batch, length)
    if rng.random() < 0.5:
        ids[:, length - length // 5 :] = -1
    return ids


def make_call(rng: random.Random, dtype: torch.dtype, is_split: bool) -> Call:
    batch, kv_heads, group = rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([1, 2, 3])
    num_queries = rng.choice([1, 5, 17, 33, 64, 70])
    num_keys = num_queries if rng.random() < 0.5 else rng.choice([1, 9, 40, 65, 100])
    if is_split:
        batch, kv_heads, group, num_queries, num_keys = 1, 1, 2, 3, 1500
    dim, value_dim = rng.choice([1, 8, 16, 19, 32, 72]), rng.choice([1, 8, 16, 20, 33, 70])
    kind = rng.choice([None, "short_documents", "shuffled", "mixed_padding"])
    ids = kv_ids = None
    if kind:
        ids = padded_ids(rng, kind, batch, num_queries)
        if num_queries != num_keys or rng.random() < 0.3:
            kv_ids = padded_ids(rng, kind, batch, num_keys)
    positions = kv_positions = None
    if rng.random() < 0.5:
        of_positions = rng.choice(["zigzag", "any", "permuted", "cache", "restarting"])
        positions, kv_positions = make_positions(of_positions, batch, num_queries, num_keys)
    heads = kv_heads * group
    tensors = {
        "q": torch.randn(batch, num_queries, heads, dim).to(dtype),
        "k": torch.randn(batch, num_keys, kv_heads, dim).to(dtype),
        "v": torch.randn(batch, num_keys, kv_heads, value_dim).to(dtype),
        "grad_out": torch.randn(batch, num_queries, heads, value_dim).to(dtype),
    }
    if rng.random() < 0.5:
        tensors["grad_lse"] = torch.randn(batch, heads, num_queries)
    options = {
        "segment_ids": ids,
        "kv_segment_ids": kv_ids,
        "positions": positions,
        "kv_positions": kv_positions,
        "causal": rng.random() < 0.5,
        "window_left": rng.choice([-1, -1, 0, 7]),
        "window_right": rng.choice([-1, -1, 0, 5]),
        "softcap": rng.choice([0.0, 0.0, 2.0]),
        "qk_scale": rng.choice([dim**-0.5, -0.3]),
    }
    return Call(tensors, options, torch.randn(heads) if rng.random() < 0.3 else None)


def poison(rng: random.Random, call: Call) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The tensors with bad elements, and which queries (B, Sq) and keys (B, Skv) have some."""
    tensors = {name: tensor.clone() for name, tensor in call.tensors.items()}
    bad_queries = torch.zeros(tensors["q"].shape[:2], dtype=torch.bool)
    bad_keys = torch.zeros(tensors["k"].shape[:2], dtype=torch.bool)
    value = rng.choice([math.nan, math.inf, -math.inf])
    chosen = rng.choice([["q"], ["k"], ["v"], ["grad_out"], ["grad_lse"], ["q", "k"], ["k", "v"], list(tensors)])
    is_whole_row, share = rng.random() < 0.5, rng.choice([0.03, 0.2])
    for name in chosen:
        if name not in tensors:
            continue
        bad = bad_keys if name in "kv" else bad_queries
        tokens = torch.rand(bad.shape) < share
        tokens[0, rng.randrange(tokens.shape[1])] = True
        bad |= tokens
        rows = tensors[name].transpose(1, 2)[..., None] if name == "grad_lse" else tensors[name]
        for batch, token in tokens.nonzero().tolist():
            if is_whole_row:
                rows[batch, token] = value
            else:
                rows[batch, token, rng.randrange(rows.shape[2]), rng.randrange(rows.shape[3])] = value
    return tensors, bad_queries, bad_keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(50))
def test_what_is_not_allowed_reaches_no_result(seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    is_split = seed % 8 == 7
    call = make_call(rng, dtype, is_split)
    tensors, bad_queries, bad_keys = poison(rng, call)
    torch.set_num_threads(rng.choice([1, 2, 5]))
    clean, results = call.run(call.tensors), call.run(tensors)

    # Where pairs are allowed, a query is reached by its own bad elements and its keys', and a key by its queries'.
    allowed = call.allowed
    is_query_reached = (bad_queries & allowed.any(2)) | (allowed & bad_keys[:, None]).any(2)
    is_key_reached = (bad_keys & allowed.any(1)) | (allowed & is_query_reached[:, :, None]).any(1)
    for name in NAMES:
        is_reached = is_key_reached if name in ("dk", "dv") else is_query_reached
        assert torch.equal(results[name][~is_reached], clean[name][~is_reached]), name
        assert clean[name].isfinite().all() or name == "lse"
    if is_split:
        return
    expected = call.expected(tensors)
    for name in NAMES:
        must_show = ~expected[name].isfinite() & (expected[name] != -math.inf if name == "lse" else True)
        assert not results[name][must_show].isfinite().any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_keys", [40, 1500])  # as one part, and split over keys
def test_one_bad_element_of_a_value_shows_in_its_column_alone(num_keys: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, length, 1, 24).to(dtype) for length in (8, num_keys, num_keys))
    clean = torch.ops.selfattn.flash_attention(q, k, v)[0]
    v[0, num_keys - 4, 0, 5] = math.inf  # for the last four queries
    out = torch.ops.selfattn.flash_attention(q, k, v)[0]
    assert (out[0, 4:, 0, 5] == math.inf).all()
    assert torch.equal(out[0, :4], clean[0, :4])
    others = [column for column in range(24) if column != 5]
    torch.testing.assert_close(
        out[..., others], clean[..., others], rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02
    )
