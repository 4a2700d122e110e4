"""Promise: the configurations in docs/pretrained_layers.md are those that the models' configurations are read as."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from selfattn import SelfAttention, SelfAttentionConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pretrained_layers.md"
ROWS = dict(re.findall(r"^\| ([^|]+) \| (\d+ \| `[^`]+`) \|$", PAGE.read_text(), re.MULTILINE))

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
COMMAND_R = {"sliding_window": 4096, "rope_parameters": {"rope_theta": 5e4}}
NEMO = {"head_dim": 128, "sliding_window": None, "rope_parameters": {"rope_theta": 1e6}}

# Of the published configurations: the class of the configuration, the layer, E, query heads, key heads, the rest.
PUBLISHED = {
    "Llama 2 7B": (hf.LlamaConfig, 0, 4096, 32, 32, {}),
    "Llama 3 8B": (hf.LlamaConfig, 0, 4096, 32, 8, {"rope_parameters": {"rope_theta": 5e5}}),
    "Llama 3.1 8B": (
        hf.LlamaConfig,
        0,
        4096,
        32,
        8,
        {"rope_parameters": LLAMA3, "max_position_embeddings": 131072},
    ),
    "Qwen2 7B": (hf.Qwen2Config, 0, 3584, 28, 4, {"rope_parameters": {"rope_theta": 1e6}}),
    "Qwen3 4B": (hf.Qwen3Config, 0, 2560, 32, 8, {"head_dim": 128, "rope_parameters": {"rope_theta": 1e6}}),
    "Mistral 7B v0.1": (hf.MistralConfig, 0, 4096, 32, 8, {"sliding_window": 4096}),
    "Mistral-Nemo 12B": (hf.MistralConfig, 0, 5120, 32, 8, NEMO),
    "Gemma 2 9B, sliding": (hf.Gemma2Config, 0, 3584, 16, 8, {"head_dim": 256}),
    "Gemma 2 9B, full": (hf.Gemma2Config, 1, 3584, 16, 8, {"head_dim": 256}),
    "Gemma 3 4B, sliding": (
        hf.Gemma3TextConfig,
        0,
        2560,
        8,
        4,
        {"head_dim": 256, "sliding_window": 1024, "rope_parameters": GEMMA3},
    ),
    "Gemma 3 4B, full": (
        hf.Gemma3TextConfig,
        5,
        2560,
        8,
        4,
        {"head_dim": 256, "sliding_window": 1024, "rope_parameters": GEMMA3},
    ),
    "gpt-oss 20B, sliding": (hf.GptOssConfig, 0, 2880, 64, 8, {}),
    "gpt-oss 20B, full": (hf.GptOssConfig, 1, 2880, 64, 8, {}),
    "Phi-3-mini 4k": (hf.Phi3Config, 0, 3072, 32, 32, {"sliding_window": 2047}),
    "Phi-4 14B": (hf.Phi3Config, 0, 5120, 40, 10, {"rope_parameters": {"rope_theta": 250000.0}}),
    "OLMo 2 7B": (hf.Olmo2Config, 0, 4096, 32, 32, {"rope_parameters": {"rope_theta": 5e5}, "rms_norm_eps": 1e-6}),
    "GLM-4 9B": (hf.GlmConfig, 0, 4096, 32, 2, {"head_dim": 128, "attention_bias": True}),
    "SmolLM3 3B, rotating": (hf.SmolLM3Config, 0, 2048, 16, 4, {"rope_parameters": {"rope_theta": 5e6}}),
    "SmolLM3 3B, every fourth": (hf.SmolLM3Config, 3, 2048, 16, 4, {"rope_parameters": {"rope_theta": 5e6}}),
    "Command R7B (Cohere 2), sliding": (hf.Cohere2Config, 0, 4096, 32, 8, COMMAND_R),
    "Command R7B (Cohere 2), full": (hf.Cohere2Config, 3, 4096, 32, 8, COMMAND_R),
    "Granite 3.1 8B": (
        hf.GraniteConfig,
        0,
        4096,
        32,
        8,
        {"attention_multiplier": 0.0078125, "rope_parameters": {"rope_theta": 1e7}},
    ),
}


def attention(config_class: type, index: int, width: int, heads: int, kv_heads: int, fields: dict) -> nn.Module:
    config = config_class(hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads, **fields)
    name = config_class.__module__.split(".")[2]
    prefix = config_class.__name__.removesuffix("Config").removesuffix("Text")
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    with torch.device("meta"):
        return getattr(modeling, f"{prefix}Attention")(config, index)


def facts(layer: SelfAttention) -> dict:
    """Everything by which two layers differ, but their initialisation."""
    names = [field.name for field in dataclasses.fields(SelfAttentionConfig) if hasattr(layer, field.name)]
    values = {name: getattr(layer, name) for name in names if name not in ("sinks", "use_bias", "num_layers")}
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    return {**values, "rope_parameters": layer.rope_parameters(), "shapes": shapes, "norms": str(layer.q_norm)}


def test_every_row_is_compared() -> None:
    assert set(ROWS) == set(PUBLISHED)


@pytest.mark.parametrize("model", PUBLISHED)
def test_row_is_what_the_configuration_is_read_as(model: str) -> None:
    width, fields = ROWS[model].split(" | ")
    fields = {"rope_pairing": "half", **eval(f"dict({fields.strip('`')})")}  # of this repository's own page
    written = SelfAttention(int(width), SelfAttentionConfig(**fields), device="meta")
    read = SelfAttention.from_pretrained_layer(attention(*PUBLISHED[model]))
    assert facts(written) == facts(read)
