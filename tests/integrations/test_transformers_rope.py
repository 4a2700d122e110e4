"""RopeParameters read from a configuration gives the frequencies, factors and tables of transformers."""

import copy
import importlib

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import selfattn
from selfattn import RopeParameters

HEAD_DIM, LENGTH = 32, 96  # LENGTH: max_position_embeddings
ORIGINAL = {"original_max_position_embeddings": 24}
YARN = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}


def longrope(pairs: int) -> dict:
    return {
        "rope_type": "longrope",
        "short_factor": [1 + index / 8 for index in range(pairs)],
        "long_factor": [2 + index for index in range(pairs)],
        **ORIGINAL,
    }


PARAMETERS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear_part": {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.25},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "dynamic_part": {"rope_type": "dynamic", "factor": 3.0, "partial_rotary_factor": 0.5},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "llama3_longer": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 9.0},
    "yarn": YARN,
    "yarn_part": YARN | {"partial_rotary_factor": 0.5, "rope_theta": 1e6},
    "yarn_not_truncated": YARN | {"truncate": False, "beta_fast": 8.0, "beta_slow": 0.5},
    "yarn_long": YARN | {"original_max_position_embeddings": 4096, "beta_fast": 20},
    "yarn_no_factor": YARN | {"factor": None},
    "yarn_attention_factor": YARN | {"attention_factor": 1.3},
    "yarn_mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 0.5},
    "yarn_one_mscale": YARN | {"mscale": 0.707},
    "yarn_zero_mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.0},
    "longrope": longrope(16),
    "longrope_part": longrope(12) | {"partial_rotary_factor": 0.75},
    "longrope_factor": longrope(16) | {"factor": 7.0},
    "longrope_attention_factor": longrope(16) | {"attention_factor": 1.3},
}

# The configuration, the module of the model and its rotary class, the parameters, the pairing.
CLASSES = {
    "llama": (hf.LlamaConfig, "llama", "Llama", {"rope_type": "default", "rope_theta": 5e5}, "half"),
    "llama_linear": (hf.LlamaConfig, "llama", "Llama", PARAMETERS["linear"], "half"),
    "llama_dynamic": (hf.LlamaConfig, "llama", "Llama", PARAMETERS["dynamic"], "half"),
    "llama_llama3": (hf.LlamaConfig, "llama", "Llama", PARAMETERS["llama3"], "half"),
    "llama_yarn": (hf.LlamaConfig, "llama", "Llama", PARAMETERS["yarn_mscale"], "half"),
    "phi3": (hf.Phi3Config, "phi3", "Phi3", {"rope_type": "default", "partial_rotary_factor": 0.75}, "half"),
    "phi3_longrope": (hf.Phi3Config, "phi3", "Phi3", PARAMETERS["longrope_part"], "half"),
    "glm4": (hf.Glm4Config, "glm4", "Glm4", {"rope_type": "default"}, "interleaved"),  # half of a head
    "gpt_oss": (hf.GptOssConfig, "gpt_oss", "GptOss", PARAMETERS["yarn_not_truncated"], "half"),
}


def configuration(cls: type, parameters: dict) -> hf.PreTrainedConfig:
    return cls(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        rope_parameters={"rope_theta": 1e4, **copy.deepcopy(parameters)},
        **({"original_max_position_embeddings": 24} if cls is hf.Phi3Config else {}),
    )


def of_configuration(config: hf.PreTrainedConfig) -> RopeParameters:
    return RopeParameters.from_transformers(config.rope_parameters, HEAD_DIM, config.max_position_embeddings)


@pytest.mark.parametrize("length", [8, 24, 25, LENGTH, LENGTH + 1, 300])
@pytest.mark.parametrize("name", PARAMETERS)
def test_frequencies_and_factor_are_those_of_the_function(name: str, length: int) -> None:
    config = configuration(hf.LlamaConfig, PARAMETERS[name])
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS[PARAMETERS[name]["rope_type"]](config, "cpu", seq_len=length)
    sin, cos = of_configuration(config).tables(torch.tensor([1]), length, dtype=torch.float64)
    torch.testing.assert_close(torch.atan2(sin, cos)[0, 0], wanted.double(), rtol=2e-6, atol=0)
    torch.testing.assert_close(torch.hypot(sin, cos), torch.full_like(sin, wanted_factor), rtol=1e-12, atol=0)


def test_every_function_is_compared() -> None:
    """What transformers may ask for beyond them is refused: of frequencies of 0, for pairs that do not turn."""
    compared = {parameters["rope_type"] for parameters in PARAMETERS.values()}
    assert set(ROPE_INIT_FUNCTIONS) - compared == {"proportional"}
    with pytest.raises(ValueError, match=r"rope_type: expected one of .*'proportional'"):
        RopeParameters.from_transformers({"rope_type": "proportional", "factor": 2.0}, HEAD_DIM, LENGTH)


def their_tables(name: str, length: int) -> tuple[RopeParameters, object, Tensor, Tensor, Tensor]:
    """Ours, the module of the model, positions up to ``length`` and the cosines and sines of the rotary class."""
    config_class, module_name, prefix, parameters, _ = CLASSES[name]
    config = configuration(config_class, parameters)
    module = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
    positions = torch.stack([torch.arange(length), torch.arange(length).flip(0)])
    cos, sin = getattr(module, f"{prefix}RotaryEmbedding")(config)(torch.zeros(1), positions)
    return of_configuration(config), module, positions, cos, sin


@pytest.mark.parametrize("length", [20, 60, 200])
@pytest.mark.parametrize("name", CLASSES)
def test_tables_are_those_of_the_rotary_class(name: str, length: int) -> None:
    parameters, _, positions, *theirs = their_tables(name, length)
    sin, cos = parameters.tables(positions)
    for found, wanted in zip((cos, sin), theirs, strict=True):
        pairs = parameters.rotary_dim // 2  # a class gives them once or, for the elements, twice
        torch.testing.assert_close(found, wanted[..., :pairs], rtol=0, atol=1e-4)
        assert wanted.shape[-1] in (pairs, 2 * pairs)


@pytest.mark.parametrize("name", CLASSES)
def test_rotation_is_that_of_the_model(name: str) -> None:
    """Whole heads and the first part of them, in both pairings, forward and gradients."""
    length = 60
    parameters, module, positions, cos, sin = their_tables(name, length)
    q, k = (torch.randn(2, length, heads, HEAD_DIM, requires_grad=True) for heads in (4, 2))
    found = selfattn.apply_rotary_emb(q, k, *parameters.tables(positions), pairing=CLASSES[name][-1])
    wanted = module.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    grads = [torch.randn_like(x) for x in found]
    results = zip(
        (*found, *torch.autograd.grad(found, (q, k), grads)),
        (*wanted, *torch.autograd.grad(wanted, (q, k), grads)),
        strict=True,
    )
    for actual, expected in results:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


def test_each_layer_type_of_gemma3_has_its_own() -> None:
    config = hf.Gemma3TextConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        head_dim=HEAD_DIM,
        max_position_embeddings=LENGTH,
        layer_types=["sliding_attention", "full_attention"],
        num_hidden_layers=2,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    )
    rotary = hf.models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding(config)
    positions = torch.arange(40)[None]
    for layer_type in config.layer_types:
        parameters = RopeParameters.from_transformers(config.rope_parameters[layer_type], HEAD_DIM, LENGTH)
        cos, sin = rotary(torch.zeros(1), positions, layer_type)
        for found, wanted in zip(parameters.tables(positions), (sin, cos), strict=True):
            torch.testing.assert_close(found, wanted[..., : HEAD_DIM // 2], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="one layer"):
        RopeParameters.from_transformers(config.rope_parameters, HEAD_DIM, LENGTH)


@pytest.mark.parametrize(
    ("config_class", "rotary_dim"),
    [(hf.LlamaConfig, 64), (hf.Phi3Config, 64), (hf.Glm4Config, 32), (hf.GptOssConfig, 64), (hf.StableLmConfig, 16)],
)
def test_default_configurations_are_read(config_class: type, rotary_dim: int) -> None:
    config = config_class()
    parameters = RopeParameters.from_transformers(config.rope_parameters, 64, config.max_position_embeddings)
    assert parameters.rotary_dim == rotary_dim
    assert parameters.rope_theta == config.rope_parameters["rope_theta"]
