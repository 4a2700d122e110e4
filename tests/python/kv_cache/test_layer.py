"""Promise: a layer over a cache gives, in pieces, what its packed forward pass gives, with every option, dense and
paged, in rows and ragged."""

import io

import pytest
import torch
from support.problems import error
from torch import nn

import selfattn
from selfattn import KVCache, PageAllocator, RopeParameters, SelfAttention, SelfAttentionConfig

E, HEAD_DIM, ROWS, LENGTH = 48, 8, 3, 11
CONFIGS = {
    "plain": {},
    "norm": {"qk_norm": True, "norm_eps": 1e-3},
    "grouped": {"num_kv_heads": 2},
    "bias": {"use_bias": True},
    "sinks": {"sinks": True},
    "window_softcap": {"window_left": 3, "softcap": 0.5},
    "no_rotation": {"rope": False},
    "norm_without_rotation": {"rope": False, "qk_norm": True},
    "norm_around_one": {"qk_norm": True, "norm_unit_offset": True},
    "norm_of_projections": {"qk_norm": True, "qk_norm_scope": "projection", "num_kv_heads": 2},
    "rotary_dim": {"rotary_dim": 4, "rope_pairing": "half"},
    "rope_scaling": {
        "rope_scaling": RopeParameters(
            rotary_dim=HEAD_DIM, rope_type="yarn", factor=4.0, original_max_position_embeddings=8
        )
    },
    "everything": {
        "qk_norm": True,
        "use_bias": True,
        "num_kv_heads": 3,
        "window_left": 4,
        "softcap": 1.0,
        "sinks": True,
        "rope_pairing": "half",
        "qk_scale": 0.8,
    },
}


def make_layer(options: dict, device: str = "cpu") -> SelfAttention:
    config = SelfAttentionConfig(head_dim=HEAD_DIM, **options)
    layer = SelfAttention(E, config, dtype=torch.float64, device=device).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.1)
    return layer


def make_cache(layer: SelfAttention, kind: str, device: str = "cpu") -> KVCache:
    sizes = {"num_kv_heads": layer.num_kv_heads, "head_dim": HEAD_DIM, "dtype": torch.float64, "device": device}
    if kind == "dense":
        return KVCache.dense(1, ROWS, LENGTH, **sizes)
    cache = KVCache.paged(1, ROWS * 3, 4, max_sequences=ROWS, max_length=LENGTH, **sizes)
    allocator = PageAllocator(cache)
    for row in range(ROWS):
        allocator.reserve(row, LENGTH)
    return cache


@torch.no_grad()
def in_pieces(layer, cache: KVCache, x: torch.Tensor, sizes=(4, 1, 1, 5)) -> torch.Tensor:
    outs = []
    for piece in x.split(sizes, 1):
        outs.append(layer(piece, cache=cache.layer(0)))
        cache.advance(piece.shape[1])
    return torch.cat(outs, 1)


@pytest.mark.parametrize("kind", ("dense", "paged"))
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_pieces_equal_the_whole(options: dict, kind: str, device: str) -> None:
    layer = make_layer(options, device)
    x = torch.randn(ROWS, LENGTH, E, dtype=torch.float64, device=device)
    assert error(in_pieces(layer, make_cache(layer, kind, device), x), layer(x)) < 1e-6


@pytest.mark.parametrize("options", [CONFIGS["everything"], CONFIGS["rotary_dim"]], ids=str)
@torch.no_grad()
def test_ragged_batches(options: dict, device: str) -> None:
    """Prompts of several lengths and single tokens of others in one row, with padding."""
    layer = make_layer(options, device)
    cache = make_cache(layer, "paged", device)
    x = torch.randn(ROWS, LENGTH, E, dtype=torch.float64, device=device)
    expected, done = layer(x), [0] * ROWS
    for counts in ((5, 0, 1), (1, 3, 0), (1, 1, 6), (4, 7, 4)):
        tokens = [(row, done[row] + i) for row, count in enumerate(counts) for i in range(count)]
        batch = torch.stack([x[token] for token in tokens] + [x.new_full((E,), 7.0)])[None]
        ids = torch.tensor([[row for row, _ in tokens] + [-1]], device=device)
        out = layer(batch, segment_ids=ids, cache=cache.layer(0))
        for i, token in enumerate(tokens):
            assert error(out[0, i], expected[token]) < 1e-6
        bias = (
            torch.zeros(E, dtype=torch.float64, device=device) if layer.out_proj.bias is None else layer.out_proj.bias
        )
        assert torch.equal(out[0, -1], bias)
        cache.advance(torch.tensor(counts, device=device))
        done = [before + count for before, count in zip(done, counts, strict=True)]
    assert done == [LENGTH] * ROWS and cache.lengths.tolist() == done


class Doubled(nn.Linear):
    """A projection that is no plain one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("options", [{}, CONFIGS["everything"], CONFIGS["norm_of_projections"]], ids=str)
def test_wrapped_projections_are_called(options: dict) -> None:
    layer = make_layer(options)
    layer.k_proj.__class__ = Doubled
    x = torch.randn(ROWS, LENGTH, E, dtype=torch.float64)
    assert error(in_pieces(layer, make_cache(layer, "dense"), x), layer(x)) < 1e-6


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_scripted_layer(options: dict) -> None:
    layer = make_layer(options)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    loaded, x = torch.jit.load(file), torch.randn(ROWS, LENGTH, E, dtype=torch.float64)
    whole = loaded(x)
    for kind in ("dense", "paged"):
        assert error(in_pieces(loaded, make_cache(layer, kind), x), whole) < 1e-6


def test_dropout_counts_in_training() -> None:
    layer = make_layer({"dropout_rate": 0.5}).train()
    with torch.no_grad():
        out = layer(torch.randn(ROWS, 2, E, dtype=torch.float64), cache=make_cache(layer, "dense").layer(0))
    assert 0.2 < (out == 0).double().mean() < 0.8


def test_gradients_are_refused_before_anything_is_written() -> None:
    layer = make_layer({})
    cache = make_cache(layer, "dense")
    with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\)"):
        layer(torch.randn(ROWS, 2, E, dtype=torch.float64), cache=cache.layer(0))
    assert (cache.keys[0] == 0).all()


@torch.no_grad()
def test_nothing_is_written_where_the_call_is_bad() -> None:
    layer = make_layer({"sinks": True, "attention_backend": "aten"})
    cache = make_cache(layer, "dense")
    with pytest.raises(NotImplementedError, match="sinks"):
        layer(torch.randn(ROWS, 2, E, dtype=torch.float64), cache=cache.layer(0))
    layer = make_layer({})
    cache.advance(LENGTH)
    with pytest.raises(ValueError, match=r"^selfattn: lengths must hold"):
        layer(torch.randn(ROWS, 1, E, dtype=torch.float64), cache=cache.layer(0))
    assert (cache.keys[0] == 0).all() and (cache.values[0] == 0).all()


@torch.no_grad()
def test_frequencies_of_a_length_need_one() -> None:
    parameters = RopeParameters(
        rotary_dim=HEAD_DIM, rope_type="dynamic", factor=2.0, original_max_position_embeddings=8
    )
    x = torch.randn(ROWS, LENGTH, E, dtype=torch.float64)
    layer = make_layer({"rope_scaling": parameters})
    with pytest.raises(ValueError, match="rope_length"):
        layer(x, cache=make_cache(layer, "dense").layer(0))
    layer = make_layer({"rope_scaling": parameters, "rope_length": LENGTH})
    assert error(in_pieces(layer, make_cache(layer, "dense"), x), layer(x)) < 1e-6


@torch.no_grad()
def test_a_tree_of_drafts() -> None:
    """Two continuations of one prompt in one call equal each alone: siblings share a rotation and not a slot."""
    layer = make_layer({"num_kv_heads": 2})
    prompt, tails = torch.randn(1, 5, E, dtype=torch.float64), torch.randn(2, 2, E, dtype=torch.float64)
    sizes = {"num_kv_heads": 2, "head_dim": HEAD_DIM, "dtype": torch.float64}
    cache = KVCache.dense(1, 1, 9, **sizes)
    layer(prompt, cache=cache.layer(0))
    cache.advance(5)
    keys, values, lengths, _ = cache.layer(0)
    mask = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]], dtype=torch.bool)
    sin, cos = selfattn.precompute_freqs(HEAD_DIM, torch.tensor([[5, 6, 5, 6]]), dtype=torch.float64)
    out = torch.ops.selfattn.self_attention_kv_cache(
        tails.flatten(0, 1)[None],
        *(getattr(layer, name).weight for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        freqs_sin=sin,
        freqs_cos=cos,
        head_dim=HEAD_DIM,
        k_cache=keys,
        v_cache=values,
        lengths=lengths,
        draft_mask=mask,
    )
    expected = layer(torch.cat([prompt.expand(2, 5, E), tails], 1))[:, 5:]
    assert error(out[0], expected.flatten(0, 1)) < 1e-6
