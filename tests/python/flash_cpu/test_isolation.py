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
from support.reference import is_allowed
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
        q, k = self.tensors["q"], self.tensors["k"]
        ids = self.options.get("segment_ids")
        kv_ids = self.options.get("kv_segment_ids")
        kv_ids = ids if kv_ids is None else kv_ids
        rules = [self.options[name] for name in ("causal", "window_left", "window_right")]
        query_ids = torch.zeros(q.shape[:2]).tolist() if ids is None else ids.tolist()
        key_ids = torch.zeros(k.shape[:2]).tolist() if kv_ids is None else kv_ids.tolist()
        lengths = (q.shape[1], k.shape[1])
        self.allowed = torch.tensor(
            [
                [
                    [is_allowed(i, j, *lengths, query_ids[b][i], key_ids[b][j], *rules) for j in range(lengths[1])]
                    for i in range(lengths[0])
                ]
                for b in range(q.shape[0])
            ]
        )

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
        q, k, v = (tensors[name].double().requires_grad_() for name in "qkv")
        group = q.shape[2] // k.shape[2]
        cap, scale = self.options["softcap"], self.options["qk_scale"]
        outs, lses = [], []
        for b, i in [(b, i) for b in range(q.shape[0]) for i in range(q.shape[1])]:
            keys = self.allowed[b, i].nonzero().flatten()
            for h in range(q.shape[2]):
                logits = scale * (k[b, keys, h // group] @ q[b, i, h])
                logits = cap * torch.tanh(logits / cap) if cap > 0 else logits
                if not len(keys) or (logits == -math.inf).all():  # a row without keys: no result depends on it
                    outs.append(q.new_zeros(v.shape[-1]))
                    lses.append(q.new_tensor(-math.inf if self.sinks is None else self.sinks[h].item()))
                    continue
                counted = logits if self.sinks is None else torch.cat([logits, self.sinks[h : h + 1].double()])
                outs.append(torch.softmax(counted, 0)[: len(keys)] @ v[b, keys, h // group])
                lses.append(torch.logsumexp(counted, 0))
        out = torch.stack(outs).view(*q.shape[:3], -1)
        lse = torch.stack(lses).view(*q.shape[:3])
        results = [(out, tensors["grad_out"].double())]
        if "grad_lse" in tensors:
            results.append((lse, tensors["grad_lse"].double().transpose(1, 2)))
        results = [(result, grad) for result, grad in results if result.requires_grad]
        grads = [None] * 3
        if results:
            found, grad_found = zip(*results, strict=True)
            grads = torch.autograd.grad(found, (q, k, v), grad_found, allow_unused=True)
        grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip((q, k, v), grads, strict=True)]
        return dict(zip(NAMES, (out.detach(), lse.detach(), *grads), strict=True))


def make_ids(rng: random.Random, kind: str, batch: int, length: int) -> Tensor:
    if kind == "packed":
        ids = (torch.rand(batch, length) < 1 / 8).cumsum(1)
    elif kind == "shuffled":
        ids = torch.randint(0, 3, (batch, length))
    else:
        ids = torch.randint(-2, 2, (batch, length))
    if rng.random() < 0.5:
        ids[:, length - length // 5 :] = -1
    return ids.int()


def make_call(rng: random.Random, dtype: torch.dtype, is_split: bool) -> Call:
    batch, kv_heads, group = rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([1, 2, 3])
    num_queries = rng.choice([1, 5, 17, 33, 64, 70])
    num_keys = num_queries if rng.random() < 0.5 else rng.choice([1, 9, 40, 65, 100])
    if is_split:
        batch, kv_heads, group, num_queries, num_keys = 1, 1, 2, 3, 1500
    dim, value_dim = rng.choice([1, 8, 16, 19, 32, 72]), rng.choice([1, 8, 16, 20, 33, 70])
    kind = rng.choice([None, "packed", "shuffled", "padding"])
    ids = kv_ids = None
    if kind:
        ids = make_ids(rng, kind, batch, num_queries)
        if num_queries != num_keys or rng.random() < 0.3:
            kv_ids = make_ids(rng, kind, batch, num_keys)
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


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(50))
def test_what_is_not_allowed_reaches_no_result(seed: int, dtype: torch.dtype, restored_threads: None) -> None:
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
