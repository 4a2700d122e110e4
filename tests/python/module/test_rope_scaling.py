"""A layer rotates as its configuration says: a part of each head, and by the frequencies of long contexts."""

import copy
import io

import pytest
import torch
from support.problems import error

import selfattn
from selfattn import RopeParameters, SelfAttention, SelfAttentionConfig

SIZES = {"head_dim": 16, "num_kv_heads": 2, "dtype": "float64"}
ORIGINAL = {"original_max_position_embeddings": 8}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0, **ORIGINAL},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "truncate": False, **ORIGINAL},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        **ORIGINAL,
    },
}


def scaling(name: str) -> RopeParameters:
    return RopeParameters(rotary_dim=8, rope_theta=500.0, **SCALINGS[name])


def layers(**fields: object) -> tuple[SelfAttention, SelfAttention]:
    """The layer, and one of the same weights that knows nothing of the rotation."""
    layer = SelfAttention(64, SelfAttentionConfig(**SIZES, **fields))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    plain = SelfAttention(64, SelfAttentionConfig(**SIZES))
    plain.load_state_dict(layer.state_dict())
    return layer, plain


@pytest.mark.parametrize("length", [5, 13])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_of_the_configuration_are_taken(name: str, length: int) -> None:
    layer, plain = layers(rope_scaling=scaling(name))
    x = torch.randn(2, length, 64, dtype=torch.float64)
    tables = scaling(name).tables(length, dtype=torch.float64)
    assert error(layer(x), plain(x, tables)) < 1e-12
    assert error(layer(x), plain(x)) > 1e-3
    assert torch.equal(layer(x, tables), plain(x, tables))  # what is given counts


def test_a_part_of_the_head_rotates() -> None:
    layer, plain = layers(rotary_dim=4, rope_theta=300.0)
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    tables = selfattn.precompute_freqs(4, max_length=9, theta=300.0, dtype=torch.float64)
    assert error(layer(x), plain(x, tables)) < 1e-12 < error(layer(x), plain(x))


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_length_is_that_of_the_call_unless_given(name: str) -> None:
    layer, plain = layers(rope_scaling=scaling(name), rope_length=30)
    x = torch.randn(2, 6, 64, dtype=torch.float64)
    found = layer(x)
    assert error(found, plain(x, scaling(name).tables(6, 30, dtype=torch.float64))) < 1e-12
    assert error(found, plain(x, scaling(name).tables(6, dtype=torch.float64))) > 1e-3


@pytest.mark.parametrize("name", SCALINGS)
def test_torchscript_computes_the_same(name: str) -> None:
    layer, _ = layers(rope_scaling=scaling(name))
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for length in (5, 13):
        x = torch.randn(2, length, 64, dtype=torch.float64)
        assert torch.equal(loaded(x), layer(x))


@pytest.mark.parametrize("name", SCALINGS)
def test_compiled_and_exported_layers_compute_the_same(name: str) -> None:
    torch.compiler.reset()
    layer, _ = layers(rope_scaling=scaling(name))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (5, 13):
        x = torch.randn(2, length, 64, dtype=torch.float64)
        assert error(compiled(x), layer(x)) < 1e-12
    assert error(torch.export.export(layer, (x,)).module()(x), layer(x)) < 1e-12


@pytest.mark.parametrize("name", SCALINGS)
def test_wrapped_layers_rotate_the_same(name: str) -> None:
    layer, _ = layers(rope_scaling=scaling(name))
    wrapped = copy.deepcopy(layer)
    wrapped.q_proj.register_forward_hook(lambda module, args, out: None)
    x = torch.randn(2, 13, 64, dtype=torch.float64)
    assert error(wrapped(x), layer(x)) < 1e-12


def test_rotation_is_said_once() -> None:
    """A dictionary of either form, agreeing fields, and plain rotation."""
    of = SelfAttentionConfig
    parameters = scaling("yarn")
    config = of(head_dim=16, rope_scaling=parameters)
    assert (config.rotary_dim, config.rope_theta, config.rope_scaling) == (8, 500.0, parameters)
    assert of(head_dim=16, rope_scaling=parameters.to_dict()) == config
    assert of.from_dict(config.to_dict()) == config
    theirs = {**SCALINGS["yarn"], "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    assert of(head_dim=16, rope_scaling=theirs) == config
    assert of(head_dim=16, rotary_dim=8, rope_theta=500.0, rope_scaling=SCALINGS["yarn"]) == config
    plain = of(head_dim=16, rope_scaling={"rope_type": "default", "rope_theta": 5e5})
    assert (plain.rotary_dim, plain.rope_theta, plain.rope_scaling) == (16, 5e5, None)


@pytest.mark.parametrize("head_dim", [44, 96, 128, 256])
def test_every_part_of_a_head_can_be_scaled(head_dim: int) -> None:
    for rotary_dim in range(2, head_dim + 1, 2):
        config = SelfAttentionConfig(head_dim=head_dim, rotary_dim=rotary_dim, rope_scaling=SCALINGS["linear"])
        assert config.rope_scaling.rotary_dim == config.rotary_dim == rotary_dim


BAD = {
    "odd": ({"rotary_dim": 7}, ValueError, "rotary_dim.*7"),
    "wide": ({"rotary_dim": 66}, ValueError, "rotary_dim.*64.*66"),
    "no_number": ({"rotary_dim": 8.0}, TypeError, "rotary_dim.*8.0"),
    "no_rope": ({"rotary_dim": 8, "rope": False}, ValueError, "rotary_dim.*rope is False"),
    "no_rope_scaling": ({"rope_scaling": scaling("yarn"), "rope": False}, ValueError, "rope_scaling.*rope is False"),
    "two_dims": ({"rotary_dim": 16, "rope_scaling": scaling("yarn")}, ValueError, "rotary_dim.*8.*16"),
    "two_thetas": ({"rope_theta": 7.0, "rope_scaling": scaling("yarn")}, ValueError, "rope_theta.*500.*7.0"),
    "scaling": ({"rope_scaling": 4.0}, TypeError, "rope_scaling.*4.0"),
    "type": ({"rope_scaling": {"rope_type": "ntk"}}, ValueError, "rope_type.*ntk"),
    "missing": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ValueError, "original_max_position_embeddings"),
    "wide_scaling": ({"head_dim": 4, "rope_scaling": scaling("yarn")}, ValueError, "rope_scaling.*head_dim 4"),
    "length": ({"rope_length": 9, "rope_scaling": scaling("yarn")}, ValueError, "rope_length.*depends"),
    "no_length": ({"rope_length": 0, "rope_scaling": scaling("dynamic")}, ValueError, "rope_length.*0"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_rotation_is_named(bad: str) -> None:
    fields, kind, text = BAD[bad]
    with pytest.raises(kind, match=text):
        SelfAttentionConfig(**fields)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCALINGS)
def test_cuda_layers_are_captured_in_a_graph(name: str) -> None:
    layer = SelfAttention(64, SelfAttentionConfig(head_dim=16, rope_scaling=scaling(name)), device="cuda")
    x = torch.randn(2, 13, 64, device="cuda")
    wanted = layer(x).detach()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = layer(x)
    out.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(copy.deepcopy(layer).cpu()(x.cpu()), wanted.cpu(), rtol=1e-4, atol=1e-5)
