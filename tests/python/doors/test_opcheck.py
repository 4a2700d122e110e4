"""torch.library.opcheck finds nothing wrong with any operator: schema, autograd registration, fake tensors, compile."""

import pytest
import torch
from support.kv_cache import CacheCase
from support.problems import POSITIONS, make_ids, make_positions

import selfattn  # noqa: F401  (registers the operators)

OPS = torch.ops.selfattn
IDS = make_ids("shuffled", 2, 6)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def attention_samples() -> list[tuple[tuple, dict]]:
    qkv = random(2, 6, 4, 8), random(2, 6, 2, 8), random(2, 6, 2, 8)
    longer_keys = random(2, 5, 4, 8), random(2, 9, 2, 8), random(2, 9, 2, 4)
    ids = {"kv_segment_ids": make_ids("shuffled", 2, 9)}
    return [
        (qkv, {}),
        ((*qkv, IDS), {}),
        ((*qkv, IDS.long(), False, 0.3), {"window_left": 2, "window_right": 1}),
        ((*longer_keys, IDS[:, :5].contiguous()), ids),
        ((*qkv, IDS), {"backend": "reference", "softcap": 1.0, "sinks": random(4)}),
        ((*qkv, IDS), {"positions": torch.arange(6).flip(0).repeat(2, 1)}),
        ((*longer_keys,), dict(zip(POSITIONS, make_positions("permuted", 2, 5, 9), strict=True))),
    ]


def flash_samples() -> list[tuple[tuple, dict]]:
    return [(args, {k: v for k, v in kwargs.items() if k != "backend"}) for args, kwargs in attention_samples()]


def flash_backward_samples() -> list[tuple[tuple, dict]]:
    samples = []
    for (q, k, v, *pairs), kwargs in flash_samples():
        call = {name: value for name, value in kwargs.items() if name != "sinks"}
        leaves = [tensor.detach() for tensor in (q, k, v)]
        out, lse = OPS.flash_attention(*leaves, *pairs, **call)
        samples.append(((torch.randn_like(out), torch.randn_like(lse), *leaves, out, lse, *pairs), call))
        samples.append(((torch.randn_like(out), None, *leaves, out, lse, *pairs), call))
    return samples


def flash_backward_into_samples() -> list[tuple[tuple, dict]]:
    samples = []
    for args, call in flash_backward_samples():
        results = {f"d{name}": torch.empty_like(args[i]) for name, i in (("q", 2), ("k", 3), ("v", 4))}
        samples.append((args, call | results))
    return samples


def merge_samples() -> list[tuple[tuple, dict]]:
    lse, other_lse = random(2, 4, 6), random(2, 4, 6)
    empty = torch.where(torch.rand(2, 4, 6) < 0.5, -float("inf"), 0.0)
    return [
        ((random(2, 6, 4, 8), lse, random(2, 6, 4, 8), other_lse), {}),
        ((random(2, 6, 4, 8), empty, random(2, 6, 4, 8), empty.flip(0)), {}),
        ((random(2, 6, 4, 8).detach().bfloat16(), lse.detach(), torch.zeros(2, 6, 4, 8).bfloat16(), empty), {}),
    ]


def norm_rope_samples() -> list[tuple[tuple, dict]]:
    q, k = random(2, 6, 4, 8), random(2, 6, 2, 8)
    return [
        ((q, k, random(8), random(8)), {}),
        ((q, k), {"positions": torch.arange(6)[None], "norm": False}),
        ((q, k, None, random(8), *OPS.precompute_freqs(8, None, 6)), {"pairing": "half"}),
        ((q.detach().bfloat16(), k.detach().bfloat16()), {"rope": False}),
    ]


def norm_rope_backward_samples() -> list[tuple[tuple, dict]]:
    samples = []
    for (q, k, *others), options in norm_rope_samples():
        tensors = [None if tensor is None else tensor.detach() for tensor in (q, k, *others)]
        grads = torch.randn_like(tensors[0]), torch.randn_like(tensors[1])
        heads = tensors[:2] if options.get("norm", True) else [None, None]
        samples.append(((*grads, *heads, *tensors[2:]), options))
    return samples


def norm_rope_attention_samples() -> list[tuple[tuple, dict]]:
    qkv = random(2, 6, 4, 8), random(2, 6, 2, 8), random(2, 6, 2, 8)
    freqs = OPS.precompute_freqs(8, None, 6)
    return [
        ((*qkv, random(8), random(8)), {}),
        ((*qkv, random(8), None, *freqs, IDS), {"pairing": "half", "window_left": 2, "sinks": random(4)}),
    ]


def norm_rope_attention_backward_samples() -> list[tuple[tuple, dict]]:
    samples = []
    for arguments, options in norm_rope_attention_samples():
        q, k, v, *others = (None if tensor is None else tensor.detach() for tensor in arguments)
        call = {name: value for name, value in options.items() if name != "sinks"}
        out, lse = OPS.qk_norm_rope_attention(q, k, v, *others, **call)
        samples.append(((torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *others), call))
        samples.append(((torch.randn_like(out), None, q, k, v, out, lse, *others), call))
    return samples


def self_attention_samples() -> list[tuple[tuple, dict]]:
    x, wide, narrow = random(2, 6, 32), random(32, 32), random(16, 32)
    options = {"head_dim": 8}
    everything = (random(32), random(16), random(16), random(32), random(8), random(8), random(4))
    sin, cos = OPS.precompute_freqs(8, None, 6)
    return [
        ((x, wide, wide, wide, wide), options),
        ((x, wide, narrow, narrow, wide, *everything, sin, cos, IDS), {**options, "softcap": 1.0, "causal": False}),
    ]


def projection_samples() -> list[tuple[tuple, dict]]:
    x, wide, narrow = random(2, 6, 32), random(32, 32), random(16, 32)
    return [((x, wide, narrow, narrow), {}), ((x, wide, wide, wide, random(32), None, random(32)), {})]


def projected_attention_samples() -> list[tuple[tuple, dict]]:
    q, k, v = random(2, 6, 32), random(2, 6, 16), random(2, 6, 16)
    sin, cos = OPS.precompute_freqs(8, None, 6)
    return [
        ((q, k, v), {"head_dim": 8}),
        ((q, k, v, random(8), random(8), random(4), sin, cos, IDS), {"head_dim": 8, "softcap": 1.0, "causal": False}),
    ]


CACHE_CASES = [
    CacheCase(num_queries=2, index_dtype=torch.int64, window_left=3),
    CacheCase(num_queries=6, ids="padded", has_sinks=True, softcap=1.0),
    CacheCase(num_queries=3, has_draft_mask=True, positions="end", layout="hnd"),
]


def cache_samples() -> list[tuple[tuple, dict]]:
    with_gradient = CacheCase(num_queries=2, table=None).make()
    for name in ("q", "k_cache", "v_cache"):
        with_gradient[name].requires_grad_()
    return [((), case.make()) for case in CACHE_CASES] + [((), with_gradient)]


def flash_cache_samples() -> list[tuple[tuple, dict]]:
    """Where a device has the kernels."""
    reasons = OPS.explain_kv_cache_backend(**CacheCase().make()).splitlines()[0]
    return [((), case.make()) for case in CACHE_CASES] if "has no kernels" not in reasons else []


def append_samples() -> list[tuple[tuple, dict]]:
    samples = []
    for ids in (None, torch.tensor([[1, 0, -1], [1, -1, 0]])):
        k, v = torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 4)
        positions, table = torch.tensor([[0, 5, 2], [3, 4, 7]]), torch.tensor([[0, 3], [2, 1]], dtype=torch.int32)
        caches = {"k_cache": torch.zeros(4, 4, 2, 8), "v_cache": torch.zeros(4, 4, 2, 4)}
        samples.append(((k, v, positions, table, ids), caches))
    dense = {"k_cache": torch.zeros(2, 8, 2, 8), "v_cache": torch.zeros(2, 8, 2, 4)}
    return [*samples, ((k, v, positions), dense)]


def norm_rope_append_samples() -> list[tuple[tuple, dict]]:
    q, weights = torch.randn(2, 3, 4, 8), (torch.rand(8), torch.rand(8))
    freqs = OPS.precompute_freqs(8, None, 3)
    samples = []
    for (k, v, *places), caches in append_samples():
        places += [None] * (3 - len(places))
        samples.append(((q, k, v, *places, *weights, *freqs), caches))
        samples.append(((q, k, v, *places), caches | {"norm": False, "pairing": "half"}))
    return samples


def layer_cache_samples() -> list[tuple[tuple, dict]]:
    """Of self_attention_kv_cache, after x, its weights and its norms."""
    table = torch.tensor([[0, 3], [2, 1]], dtype=torch.int32)
    caches = {"k_cache": torch.zeros(4, 4, 2, 8), "v_cache": torch.zeros(4, 4, 2, 8), "head_dim": 8}
    lengths = torch.tensor([3, 0], dtype=torch.int32)
    return [
        ((), caches | {"lengths": lengths, "page_table": table}),
        ((None, None, None, None, None, torch.tensor([[1, 0, 0], [-1, 1, 1]])),
         caches | {"lengths": lengths, "page_table": table, "rope_pairing": "half"}),
    ]  # fmt: skip


def self_attention_cache_samples() -> list[tuple[tuple, dict]]:
    x, wide, narrow = torch.randn(2, 3, 32), torch.randn(32, 32), torch.randn(16, 32)
    layer = (x, wide, narrow, narrow, wide, torch.randn(32), None, None, None)
    return [((*layer, *of_cache), options) for of_cache, options in layer_cache_samples()]


def projected_cache_samples() -> list[tuple[tuple, dict]]:
    q, k, v = torch.randn(2, 3, 32), torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    return [((q, k, v, *of_cache), options) for of_cache, options in layer_cache_samples()]


LENGTHS = torch.tensor([3, 8], dtype=torch.int32)
ROWS_OF_TOKENS = torch.tensor([[1, 0, -1], [1, 1, 0]])


def context_parallel_samples() -> list[tuple[tuple, dict]]:
    """Without a group, and so without split documents: those are in distributed/test_context_parallel.py."""
    nothing = torch.zeros(2, 0, dtype=torch.int32)
    group = {"shared": 0, "group_size": 2, "group_name": "", "positions": torch.arange(6).repeat(2, 1)}
    qkv = random(2, 6, 4, 8), random(2, 6, 2, 8), random(2, 6, 2, 8)
    return [
        ((*qkv, IDS, nothing), {**group, "kv_positions": nothing}),
        ((*qkv, IDS, nothing), {**group, "kv_positions": nothing, "window_left": 2, "sinks": random(4)}),
    ]


def context_parallel_backward_samples() -> list[tuple[tuple, dict]]:
    samples = []
    for (q, k, v, *ids), kwargs in context_parallel_samples():
        leaves = [tensor.detach() for tensor in (q, k, v)]
        call = {name: value.detach() if name == "sinks" else value for name, value in kwargs.items()}
        out, lse, shared_lse, exchanged = OPS.context_parallel_attention_forward(*leaves, *ids, **call)
        samples.append(((torch.randn_like(out), out, lse, shared_lse, exchanged, *leaves, *ids), call))
    return samples


SAMPLES = {
    "attention_with_kv_cache": cache_samples,
    "attention_with_kv_cache_lse": cache_samples,
    "flash_attention_kv_cache": flash_cache_samples,
    "append_kv_cache": append_samples,
    "qk_norm_rope_append": norm_rope_append_samples,
    "kv_cache_positions": lambda: [
        ((LENGTHS, None, 3, 8), {}),
        ((LENGTHS, ROWS_OF_TOKENS, 3, 8), {}),
        ((LENGTHS, ROWS_OF_TOKENS, 3, 8, torch.arange(6).view(2, 3)), {}),
    ],
    "positions_of_append": lambda: [
        ((LENGTHS - 3, None, 3, 8), {}),
        ((LENGTHS - 3, ROWS_OF_TOKENS, 3, 8), {}),
        ((LENGTHS - 3, ROWS_OF_TOKENS, 3, 8, torch.arange(6).view(2, 3)), {}),
    ],
    "kv_cache_pages": lambda: [
        ((torch.tensor([[0, -1], [2, 9]]), torch.tensor([[True, False], [True, False]]), 3), {}),
    ],
    "lengths_after_append": lambda: [((LENGTHS, None, 3), {}), ((LENGTHS, ROWS_OF_TOKENS, 3), {})],
    "self_attention_kv_cache": self_attention_cache_samples,
    "projected_attention_kv_cache": projected_cache_samples,
    "multihead_attention": attention_samples,
    "multihead_attention_lse": attention_samples,
    "merge_attention": merge_samples,
    "flash_attention": flash_samples,
    "flash_attention_backward": flash_backward_samples,
    "flash_attention_backward.into": flash_backward_into_samples,
    "segment_mask": lambda: [((IDS,), {}), ((IDS, make_ids("packed", 2, 9)), {})],
    "segment_ids_from_positions": lambda: [((torch.tensor([[0, 1, 0, 1, 2, 0]]),), {})],
    "segment_ids_from_cu_seqlens": lambda: [((torch.tensor([0, 2, 5]), 7), {})],
    "cu_seqlens_from_segment_ids": lambda: [((IDS, 6), {})],
    "precompute_freqs": lambda: [
        ((8, None, 5), {}),
        ((8, torch.tensor([[0, 1, 0]]), None, 100.0), {"dtype": torch.bfloat16}),
    ],
    "rope_tables": lambda: [
        ((8, None, 5), {}),
        ((4, torch.tensor([[0, 1, 0]])), {"rope_type": "linear", "factor": 2.0, "dtype": torch.bfloat16}),
    ],
    "apply_rotary_emb": lambda: [
        ((random(2, 6, 4, 8), random(2, 6, 2, 8)), {}),
        ((random(2, 6, 4, 8), random(2, 6, 2, 8), *OPS.precompute_freqs(8, None, 6)), {"pairing": "half"}),
    ],
    "qk_norm_rope": norm_rope_samples,
    "qk_norm_rope_backward": norm_rope_backward_samples,
    "qk_norm_rope_backward.in_place": norm_rope_backward_samples,
    "qk_norm_rope_attention": norm_rope_attention_samples,
    "qk_norm_rope_attention_backward": norm_rope_attention_backward_samples,
    "context_parallel_attention": context_parallel_samples,
    "context_parallel_attention_forward": context_parallel_samples,
    "context_parallel_attention_backward": context_parallel_backward_samples,
    "project_query_key_value": projection_samples,
    "projected_attention": projected_attention_samples,
    "self_attention": self_attention_samples,
}


def test_every_operator_with_tensors_has_samples() -> None:
    registered = {
        schema.name.removeprefix("selfattn::") + (schema.overload_name and f".{schema.overload_name}")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("selfattn::")
    }
    of_the_host = {"explain_backend", "explain_kv_cache_backend", "context_layout"}  # strings, and values that are read
    assert registered - of_the_host == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_operator_is_clean(name: str) -> None:
    samples = SAMPLES[name]()
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(OPS, packet), overload or "default")
    for args, kwargs in samples:
        torch.library.opcheck(operator, args, kwargs)
