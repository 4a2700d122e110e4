"""transformers' attention modules as ``SelfAttention``: what each class computes, as data, and whose weights are whose.

Classes are known by their names, so that nothing here imports transformers.
"""

import copy as _copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from selfattn.config import _DTYPES, SelfAttentionConfig
from selfattn.module import SelfAttention, _is_untouched
from selfattn.norm import RMSNorm
from selfattn.rope import RopeParameters

_WHERE = "SelfAttention.from_pretrained_layer"


@dataclass(frozen=True)
class _Attention:
    """What a class computes, where it is not what Llama's computes."""

    window: str | None = None
    """Which layers have ``config.sliding_window``: "all", or those of the "layer_type" sliding_attention."""
    rotates: Callable[[nn.Module], bool] = lambda module: True
    pairing: str = "half"
    partial: bool = False
    """Whether rope_type "default" heeds ``partial_rotary_factor``, too."""
    norm: str | None = None
    """The scope of the RMSNorm of q and k."""
    unit_offset: bool = False
    softcap: bool = False
    sinks: bool = False
    fused: bool = False
    """One ``qkv_proj`` in place of three projections."""
    output_dropout: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    """Fields of the configuration that must be None or False, and what they ask for."""


def _rotates_if_told(module: nn.Module) -> bool:
    return bool(module.use_rope)


def _rotates_in_windows(module: nn.Module) -> bool:
    return module.sliding_window is not None


def _rotates_in_windows_if_any(module: nn.Module) -> bool:
    return module.sliding_window is None or module.is_sliding


_LLAMA = _Attention()
_WINDOWS = _Attention(window="all")
_LAYER_TYPES = _Attention(window="layer_type")
_GLM = _Attention(pairing="interleaved", partial=True)
_LAYER_NORM = {"use_qk_norm": "a norm of q and k that is not RMSNorm"}

# Model and class: transformers.models.<model>.modeling_<model>.<class>.
_CLASSES: dict[tuple[str, str], _Attention] = {
    ("apertus", "ApertusAttention"): _Attention(norm="head"),
    ("arcee", "ArceeAttention"): _LLAMA,
    ("cohere", "CohereAttention"): _Attention(pairing="interleaved", refused=_LAYER_NORM),
    ("cohere2", "Cohere2Attention"): _Attention(
        window="layer_type", rotates=_rotates_in_windows, pairing="interleaved"
    ),
    ("cwm", "CwmAttention"): _LAYER_TYPES,
    ("dots1", "Dots1Attention"): _Attention(window="layer_type", norm="head"),
    ("ernie4_5", "Ernie4_5Attention"): _Attention(pairing="interleaved"),
    ("exaone4", "Exaone4Attention"): _Attention(window="layer_type", rotates=_rotates_in_windows_if_any, norm="head"),
    ("flex_olmo", "FlexOlmoAttention"): _Attention(norm="projection"),
    ("gemma", "GemmaAttention"): _LLAMA,
    ("gemma2", "Gemma2Attention"): _Attention(window="layer_type", softcap=True),
    ("gemma3", "Gemma3Attention"): _Attention(window="layer_type", norm="head", unit_offset=True),
    ("glm", "GlmAttention"): _GLM,
    ("glm4", "Glm4Attention"): _GLM,
    ("gpt_oss", "GptOssAttention"): _Attention(window="layer_type", sinks=True),
    ("granite", "GraniteAttention"): _LLAMA,
    ("granitemoe", "GraniteMoeAttention"): _LLAMA,
    ("granitemoeshared", "GraniteMoeSharedAttention"): _LLAMA,
    ("helium", "HeliumAttention"): _Attention(pairing="interleaved"),
    ("llama", "LlamaAttention"): _LLAMA,
    ("minimax_m2", "MiniMaxM2Attention"): _Attention(norm="projection", partial=True),
    ("ministral", "MinistralAttention"): _LAYER_TYPES,
    ("mistral", "MistralAttention"): _WINDOWS,
    ("mixtral", "MixtralAttention"): _WINDOWS,
    ("olmo", "OlmoAttention"): _Attention(refused={"clip_qkv": "projections that are clipped"}),
    ("olmo2", "Olmo2Attention"): _Attention(norm="projection"),
    ("olmo3", "Olmo3Attention"): _Attention(window="layer_type", norm="projection"),
    ("phi3", "Phi3Attention"): _Attention(window="all", partial=True, fused=True),
    ("qwen2", "Qwen2Attention"): _LAYER_TYPES,
    ("qwen2_moe", "Qwen2MoeAttention"): _LAYER_TYPES,
    ("qwen3", "Qwen3Attention"): _Attention(window="layer_type", norm="head"),
    ("qwen3_moe", "Qwen3MoeAttention"): _Attention(window="all", norm="head"),
    ("seed_oss", "SeedOssAttention"): _Attention(output_dropout=True),
    ("smollm3", "SmolLM3Attention"): _Attention(window="layer_type", rotates=_rotates_if_told),
    ("starcoder2", "Starcoder2Attention"): _Attention(window="all", output_dropout=True),
    ("vaultgemma", "VaultGemmaAttention"): _Attention(window="layer_type", softcap=True),
}

# Classes that are asked for, and what SelfAttention does not do.
_GATED = "multiplies its output by a gate"
_LATENT = "compresses queries, keys and values (multi-head latent attention)"
_REFUSED: dict[tuple[str, str], str] = {
    ("afmoe", "AfmoeAttention"): _GATED,
    ("bart", "BartAttention"): "is made for encoders and cross-attention, too",
    ("deepseek_v2", "DeepseekV2Attention"): _LATENT,
    ("deepseek_v3", "DeepseekV3Attention"): _LATENT,
    ("hunyuan_v1_dense", "HunYuanDenseV1Attention"): "normalises q and k after the rotation",
    ("llama4", "Llama4TextAttention"): "attends in chunks, and scales its queries by their positions",
    ("ministral3", "Ministral3Attention"): "scales its queries by their positions",
    ("mllama", "MllamaTextCrossAttention"): "is cross-attention",
    ("qwen3_5", "Qwen3_5Attention"): _GATED,
    ("qwen3_next", "Qwen3NextAttention"): _GATED,
    ("t5", "T5Attention"): "adds a bias of positions to its logits",
}


def from_pretrained_layer(
    layer_class: type[SelfAttention], module: nn.Module, *, copy: bool | None = None
) -> SelfAttention:
    """What ``SelfAttention.from_pretrained_layer`` says."""
    if copy is not None and not isinstance(copy, bool):
        raise TypeError(f"{_WHERE}: copy: expected None, True or False, got {copy!r}")
    attention = _recognise(module)
    if attention.fused and copy is False:
        raise ValueError(
            f"{_WHERE}: copy: expected None or True, since {type(module).__name__}.qkv_proj is one weight, which is "
            "split into three that are copied; got False"
        )
    _refuse_what_surrounds(module)
    config = _configuration(module, attention)
    layer = layer_class(module.config.hidden_size, config, device="meta")
    _take_projections(layer, module, attention)
    _check_widths(layer)
    if attention.norm is not None:
        for name in ("q_norm", "k_norm"):
            _take_norm(layer, name, getattr(module, name), type(module).__module__)
    if attention.sinks:
        layer.sinks = module.sinks
    layer.training = module.training
    return _copy.deepcopy(layer) if copy else layer


def _recognise(module: nn.Module) -> _Attention:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{_WHERE}: module: expected an attention module of transformers, got {type(module).__name__}")
    kind = type(module)
    path = kind.__module__.split(".")
    model = path[2] if len(path) == 4 else ""
    is_theirs = kind.__module__ == f"transformers.models.{model}.modeling_{model}"
    attention = _CLASSES.get((model, kind.__qualname__)) if is_theirs else None
    if attention is not None and kind.forward.__module__ != kind.__module__:
        raise NotImplementedError(
            f"{_WHERE}: module: {kind.__name__}.forward was replaced by one of {kind.forward.__module__}: "
            "what that computes is unknown"
        )
    if attention is not None:
        return attention
    reason = _REFUSED.get((model, kind.__qualname__)) if is_theirs else None
    if reason is not None:
        raise NotImplementedError(f"{_WHERE}: module: {kind.__name__} {reason}, which SelfAttention does not do")
    known = ", ".join(name for _, name in _CLASSES)
    raise NotImplementedError(
        f"{_WHERE}: module: expected exactly one of transformers' classes {known}; got "
        f"{kind.__module__}.{kind.__qualname__}, which is unknown. A layer's module is model.layers[i].self_attn; "
        "for other classes make SelfAttention from a SelfAttentionConfig and load the weights"
    )


def _refuse_what_surrounds(module: nn.Module) -> None:
    """What is wrapped around the submodules is taken over with them. What is around the whole would be lost."""
    state = module.__dict__
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if "forward" in state or any(state[name] for name in hooks):
        raise ValueError(
            f"{_WHERE}: module: expected {type(module).__name__} without hooks and with its own forward; got one with "
            "hooks or a replaced forward, which would be lost: remove them (accelerate's by "
            "accelerate.hooks.remove_hook_from_module), and put yours on the new layer"
        )


def _configuration(module: nn.Module, attention: _Attention) -> SelfAttentionConfig:
    config, name = module.config, type(module).__name__
    for field_name, what in attention.refused.items():
        if getattr(config, field_name, None) not in (None, False):
            raise NotImplementedError(
                f"{_WHERE}: module: config.{field_name}: expected None or False, got "
                f"{getattr(config, field_name)!r}: SelfAttention does not do {what}"
            )
    if module.attention_dropout > 0:
        raise NotImplementedError(
            f"{_WHERE}: module: attention_dropout: expected 0, got {module.attention_dropout}: SelfAttention drops no "
            f"weights of attention. Set attention_dropout of the configuration, and of a {name} that is built, to 0"
        )
    if not module.is_causal or getattr(config, "is_causal", True) is False:
        raise NotImplementedError(f"{_WHERE}: module: is_causal: expected True, got a {name} that sees both ways")

    parameter = next((p for p in module.parameters() if p.dtype in _DTYPES.values()), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    projections = (module.qkv_proj,) if attention.fused else (module.q_proj, module.k_proj, module.v_proj)
    return SelfAttentionConfig(
        head_dim=module.head_dim,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        num_layers=config.num_hidden_layers,
        dtype=next(known for known, value in _DTYPES.items() if value == dtype),
        qk_scale=None if module.scaling == module.head_dim**-0.5 else float(module.scaling),
        qkv_bias=any(_has_bias(projection) for projection in projections),
        out_bias=_has_bias(module.o_proj),
        qk_norm=attention.norm is not None,
        qk_norm_scope=attention.norm or "head",
        norm_unit_offset=attention.unit_offset,
        norm_eps=config.rms_norm_eps if attention.norm is not None else SelfAttentionConfig.norm_eps,
        window_left=_window_left(module, attention),
        softcap=(module.attn_logit_softcapping or 0.0) if attention.softcap else 0.0,
        sinks=attention.sinks,
        dropout_rate=module.residual_dropout if attention.output_dropout else 0.0,
        rope_pairing=attention.pairing,
        **_rotation(module, attention),
    )


def _has_bias(projection: nn.Module) -> bool:
    return getattr(projection, "bias", None) is not None


def _layer_type(module: nn.Module) -> str:
    types = getattr(module.config, "layer_types", None)
    index = module.layer_idx
    if types is None or index is None or not 0 <= index < len(types):
        raise ValueError(
            f"{_WHERE}: module: layer_idx: expected an index into config.layer_types, got {index!r} and {types!r}"
        )
    if types[index] not in ("sliding_attention", "full_attention"):
        raise NotImplementedError(
            f"{_WHERE}: module: config.layer_types[{index}]: expected 'sliding_attention' or 'full_attention', "
            f"got {types[index]!r}"
        )
    return types[index]


def _window_left(module: nn.Module, attention: _Attention) -> int:
    """Of the mask that the model makes for the layer: modules need not hold it."""
    if attention.window is None or (attention.window == "layer_type" and _layer_type(module) == "full_attention"):
        return -1
    window = module.config.sliding_window
    if window is None and attention.window == "all":
        return -1
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"{_WHERE}: module: config.sliding_window: expected a number of tokens, got {window!r}")
    own = getattr(module, "sliding_window", window)
    if own != window:
        raise ValueError(f"{_WHERE}: module: sliding_window: expected that of its configuration, {window}, got {own!r}")
    return window - 1


def _rotation(module: nn.Module, attention: _Attention) -> dict[str, Any]:
    if not attention.rotates(module):
        return {"rope": False}
    parameters = module.config.rope_parameters
    if isinstance(parameters, Mapping) and any(isinstance(value, Mapping) for value in parameters.values()):
        parameters = parameters.get(_layer_type(module))
        if isinstance(parameters, Mapping):  # transformers looks for this key outside of the layer types
            parameters = {name: value for name, value in parameters.items() if name != "truncate"}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"{_WHERE}: module: config.rope_parameters: expected those of the layer, got {parameters!r}")
    parameters = dict(parameters)
    is_plain = parameters.get("rope_type", parameters.get("type", "default")) == "default"
    share = parameters.get("partial_rotary_factor")
    if not attention.partial and share is not None:
        if not is_plain and share != 1:
            raise NotImplementedError(
                f"{_WHERE}: module: config.rope_parameters: {type(module).__name__} rotates whole heads, "
                f"got partial_rotary_factor {share!r}"
            )
        del parameters["partial_rotary_factor"]
    length = module.config.max_position_embeddings
    return {"rope_scaling": RopeParameters.from_transformers(parameters, module.head_dim, length)}


def _take_projections(layer: SelfAttention, module: nn.Module, attention: _Attention) -> None:
    if attention.fused:
        _split(layer, module)
    else:
        for name in ("q_proj", "k_proj", "v_proj"):
            _take_projection(layer, name, getattr(module, name))
    _take_projection(layer, "out_proj", module.o_proj)


def _take_projection(layer: SelfAttention, name: str, source: nn.Module) -> None:
    """The parameters of a plain one, else the module itself, so that what is wrapped around it counts."""
    if not _is_untouched(source, nn.Linear):
        setattr(layer, name, source)
        return
    own = getattr(layer, name)
    own.weight, own.bias, own.training = source.weight, source.bias, source.training


def _split(layer: SelfAttention, module: nn.Module) -> None:
    source = module.qkv_proj
    if not _is_untouched(source, nn.Linear):
        raise ValueError(
            f"{_WHERE}: module: qkv_proj: expected a plain nn.Linear, which can be split, got "
            f"{type(source).__name__}, or one with hooks or other weights: merge or remove what is wrapped around it"
        )
    heads, kv_heads = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    if source.out_features != heads + 2 * kv_heads:
        raise ValueError(
            f"{_WHERE}: module: qkv_proj: expected {heads + 2 * kv_heads} output features, got {source.out_features}"
        )
    for name, rows in (
        ("q_proj", slice(heads)),
        ("k_proj", slice(heads, heads + kv_heads)),
        ("v_proj", slice(heads + kv_heads, None)),
    ):
        own = getattr(layer, name)
        own.weight, own.training = _rows(source.weight, rows), source.training
        own.bias = None if source.bias is None else _rows(source.bias, rows)


def _rows(parameter: nn.Parameter, rows: slice) -> nn.Parameter:
    part: Tensor = parameter.detach()[rows].clone()
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def _check_widths(layer: SelfAttention) -> None:
    """Weights that were pruned, or spread over devices, are no longer what the configuration says."""
    heads, kv_heads = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    width = layer.embedding_dim
    for name, expected in (
        ("q_proj", (heads, width)),
        ("k_proj", (kv_heads, width)),
        ("v_proj", (kv_heads, width)),
        ("out_proj", (width, heads)),
    ):
        projection = getattr(layer, name)
        if _is_untouched(projection, nn.Linear):
            shape = tuple(projection.weight.shape)
        else:  # its weights may be packed
            shape = (getattr(projection, "out_features", expected[0]), getattr(projection, "in_features", expected[1]))
        if shape != expected:
            theirs = "o_proj" if name == "out_proj" else name
            raise ValueError(f"{_WHERE}: module: {theirs}: expected {expected} (out, in), got {shape}")


def _take_norm(layer: SelfAttention, name: str, source: nn.Module, home: str) -> None:
    """Likewise: an RMSNorm of the model's own becomes one that the operators apply, with the same weight and eps."""
    kind = type(source)
    is_theirs = kind.__module__ == kind.forward.__module__ == home and kind.__name__.endswith("RMSNorm")
    if not (is_theirs and _is_untouched(source, kind)):
        setattr(layer, name, source)
        return
    own: nn.RMSNorm | RMSNorm = getattr(layer, name)
    if source.weight.shape != own.weight.shape:
        raise ValueError(
            f"{_WHERE}: module: {name}: expected a weight of shape {tuple(own.weight.shape)}, "
            f"got {tuple(source.weight.shape)}"
        )
    own.weight, own.training = source.weight, source.training
    own.eps = source.variance_epsilon if hasattr(source, "variance_epsilon") else source.eps
