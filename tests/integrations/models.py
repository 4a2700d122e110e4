"""Small decoders of transformers with random weights, and what their tests share."""

import functools

import pytest
import torch
import transformers as hf
from torch import Tensor

VOCABULARY = 97
WINDOW = 5  # of the sliding layers: shorter than every document of the tests but the shortest
PAD = 0
ORIGINAL = {"original_max_position_embeddings": 24}  # of rotations for long contexts
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,  # generation runs to its end
    "initializer_range": 0.15,  # large enough for attention to matter
    "attention_dropout": 0.0,
}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 2

# name: class of the configuration, class of the model, what the configuration says beyond _SIZES
_MODELS = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {}),
    "qwen2_sliding": (
        hf.Qwen2Config,
        hf.Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _SLIDING_AND_FULL},
    ),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {"head_dim": 32}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": WINDOW, "head_dim": 16}),
    "gemma2": (
        hf.Gemma2Config,
        hf.Gemma2ForCausalLM,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 3.0,
            "layer_types": _SLIDING_AND_FULL,
        },
    ),
    "gemma3": (
        hf.Gemma3TextConfig,
        hf.Gemma3ForCausalLM,
        {"head_dim": 32, "query_pre_attn_scalar": 20, "sliding_window": WINDOW, "layer_types": _SLIDING_AND_FULL},
    ),
    "gpt_oss": (
        hf.GptOssConfig,
        hf.GptOssForCausalLM,
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING_AND_FULL,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "phi3": (hf.Phi3Config, hf.Phi3ForCausalLM, {"partial_rotary_factor": 0.5}),
    "phi3_sliding": (hf.Phi3Config, hf.Phi3ForCausalLM, {"sliding_window": WINDOW}),
    "olmo2": (hf.Olmo2Config, hf.Olmo2ForCausalLM, {}),
    "glm4": (hf.Glm4Config, hf.Glm4ForCausalLM, {"head_dim": 16}),
    "smollm3": (hf.SmolLM3Config, hf.SmolLM3ForCausalLM, {"no_rope_layers": [1, 0, 1, 0]}),
    "cohere2": (
        hf.Cohere2Config,
        hf.Cohere2ForCausalLM,
        {"sliding_window": WINDOW, "layer_types": _SLIDING_AND_FULL, "logit_scale": 1.0},
    ),
    "granite": (hf.GraniteConfig, hf.GraniteForCausalLM, {"attention_multiplier": 0.2}),
}
NAMES = list(_MODELS)

# Those whose attention is like one of theirs, for tests of single layers alone.
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SLIDING = {"sliding_window": WINDOW, "layer_types": _SLIDING_AND_FULL}
_RELATIVES = {
    "apertus": (hf.ApertusConfig, hf.ApertusForCausalLM, {}),
    "arcee": (hf.ArceeConfig, hf.ArceeForCausalLM, {"attention_bias": True}),
    "cohere": (hf.CohereConfig, hf.CohereForCausalLM, {"logit_scale": 1.0}),
    "cwm": (hf.CwmConfig, hf.CwmForCausalLM, {"head_dim": 16, **_SLIDING}),
    "dots1": (hf.Dots1Config, hf.Dots1ForCausalLM, {"head_dim": 32, "first_k_dense_replace": 4, **_SLIDING}),
    "ernie4_5": (hf.Ernie4_5Config, hf.Ernie4_5ForCausalLM, {"head_dim": 32, "use_bias": True}),
    "exaone4": (hf.Exaone4Config, hf.Exaone4ForCausalLM, {"head_dim": 16, **_SLIDING}),
    "exaone4_full": (
        hf.Exaone4Config,
        hf.Exaone4ForCausalLM,
        {"head_dim": 16, "sliding_window": None, "layer_types": ["full_attention"] * 4},
    ),
    "flex_olmo": (hf.FlexOlmoConfig, hf.FlexOlmoForCausalLM, _MOE),
    "gemma": (hf.GemmaConfig, hf.GemmaForCausalLM, {"head_dim": 32}),
    "glm": (hf.GlmConfig, hf.GlmForCausalLM, {"head_dim": 16, "attention_bias": True}),
    "granitemoe": (hf.GraniteMoeConfig, hf.GraniteMoeForCausalLM, {"attention_multiplier": 0.2, **_MOE}),
    "granitemoeshared": (
        hf.GraniteMoeSharedConfig,
        hf.GraniteMoeSharedForCausalLM,
        {"attention_multiplier": 0.2, "shared_intermediate_size": 32, **_MOE},
    ),
    "helium": (hf.HeliumConfig, hf.HeliumForCausalLM, {"head_dim": 16, "attention_bias": True}),
    "minimax_m2": (
        hf.MiniMaxM2Config,
        hf.MiniMaxM2ForCausalLM,
        {"head_dim": 32, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, **_MOE},
    ),
    "ministral": (hf.MinistralConfig, hf.MinistralForCausalLM, {"head_dim": 32, **_SLIDING}),
    "mistral_nemo": (hf.MistralConfig, hf.MistralForCausalLM, {"head_dim": 32, "sliding_window": None}),
    "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM, {"head_dim": 16, "sliding_window": WINDOW, **_MOE}),
    "olmo": (hf.OlmoConfig, hf.OlmoForCausalLM, {"clip_qkv": None}),
    "olmo3": (hf.Olmo3Config, hf.Olmo3ForCausalLM, _SLIDING),
    "qwen2_moe": (
        hf.Qwen2MoeConfig,
        hf.Qwen2MoeForCausalLM,
        {"use_sliding_window": True, "shared_expert_intermediate_size": 32, **_SLIDING, **_MOE},
    ),
    "qwen3_moe": (
        hf.Qwen3MoeConfig,
        hf.Qwen3MoeForCausalLM,
        {"head_dim": 32, "use_sliding_window": True, "sliding_window": WINDOW, **_MOE},
    ),
    "seed_oss": (hf.SeedOssConfig, hf.SeedOssForCausalLM, {"head_dim": 32, "residual_dropout": 0.3}),
    "starcoder2": (
        hf.Starcoder2Config,
        hf.Starcoder2ForCausalLM,
        {"sliding_window": WINDOW, "residual_dropout": 0.3, "use_bias": True},
    ),
    "vaultgemma": (
        hf.VaultGemmaConfig,
        hf.VaultGemmaForCausalLM,
        {"head_dim": 32, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0, **_SLIDING},
    ),
}
RELATIVES = list(_RELATIVES)
every_model = pytest.mark.parametrize("name", NAMES)


def build(name: str, implementation: str = "selfattn", *, layers: int = 4, **changes) -> torch.nn.Module:
    """A model of ``NAMES`` or ``RELATIVES`` in float32, with the same weights each time."""
    model = initialise(name, implementation, layers, changes)
    model.load_state_dict(_weights(name, layers))
    return model


def initialise(name: str, implementation: str, layers: int, changes: dict) -> torch.nn.Module:
    """Likewise, with any weights: ``changes`` may ask for others than the model has."""
    configuration, model_class, extra = (_MODELS | _RELATIVES)[name]
    options = {**_SIZES, **extra, "num_hidden_layers": layers, **changes}
    for each_layer in ("layer_types", "no_rope_layers"):
        if each_layer in options:
            options[each_layer] = options[each_layer][:layers]
    config = configuration(**options)
    config._attn_implementation = implementation
    return model_class(config).eval()


@functools.cache
def _weights(name: str, layers: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = initialise(name, "eager", layers, {})
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith(("bias", "sinks")):
                torch.nn.init.normal_(parameter, parameter.detach().mean().item(), 0.3)  # not all ones, not all zeros
        return model.state_dict()


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCABULARY, shape)


def padded(lengths: list[int], side: str) -> dict[str, Tensor]:
    """Rows of the lengths, padded on a side: input_ids and attention_mask."""
    width = max(lengths)
    column = torch.arange(width)[None]
    length = torch.tensor(lengths)[:, None]
    real = column < length if side == "right" else column >= width - length
    return {"input_ids": tokens(len(lengths), width).masked_fill(~real, PAD), "attention_mask": real.long()}


def difference(given: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest expected number."""
    return ((given - expected).abs().max() / expected.abs().max()).item()
