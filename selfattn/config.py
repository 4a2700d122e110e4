"""What a self-attention layer is, as data: validated when made, and written to and read from plain dictionaries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from selfattn._validated_config import _ValidatedConfig
from selfattn.rope import RopeParameters

_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


class AttentionBackend(str, Enum):
    """The backends of ``multihead_attention``; each member is also the string that the operator takes.

    ``PALLAS_TRITON``, ``TRITON`` and ``XLA`` are the names that JAX code bases use: aliases of the same members, so
    ``AttentionBackend("xla") is AttentionBackend.ATEN``.
    """

    AUTO = "auto"
    FLASH = "flash"
    CUDNN = "cudnn"
    ATEN = "aten"
    REFERENCE = "reference"

    PALLAS_TRITON = "flash"
    TRITON = "flash"
    XLA = "aten"

    @classmethod
    def names(cls) -> list[str]:
        """Every accepted spelling, aliases included."""
        return [name.lower() for name in cls.__members__]

    @classmethod
    def _missing_(cls, value: object) -> "AttentionBackend | None":
        return cls.__members__.get(value.upper()) if isinstance(value, str) and value.islower() else None

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(_ValidatedConfig):
    """How a model is spread over devices.

    The fields are held, validated and serialised, as JAX code bases write them. No layer here is spread over devices
    yet: one that is built refuses every field that asks for it (see ``require_single_device``), so that nothing is
    ignored in silence. The names of the axes ask for nothing by themselves.
    """

    data_axis_name: str = "dp"
    fsdp_axis_name: str = "fsdp"
    pipeline_axis_name: str = "pp"
    model_axis_name: str = "tp"
    data_axis_size: int = -1
    """-1 takes every device that the other axes leave: on one device, one."""
    fsdp_axis_size: int = 1
    pipeline_axis_size: int = 1
    model_axis_size: int = 1
    remat: Sequence[str] = ()
    """Names of the modules whose activations are computed again in the backward pass."""
    fsdp_modules: Sequence[str] = ()
    """Names of the modules whose weights the fsdp axis shards."""
    fsdp_min_weight_size: int = 2**18
    """Elements of the smallest weight that the fsdp axis shards."""
    fsdp_gather_dtype: str | None = None
    """In which sharded weights are gathered; None is their own."""
    fsdp_grad_scatter_dtype: str | None = None
    """In which their gradients are added up and scattered; None is their own."""
    tp_async_dense: bool = False
    """Whether communication of the model axis runs beside the matrix products."""

    def __post_init__(self) -> None:
        axes = ("data", "fsdp", "pipeline", "model")
        for axis in axes:
            name = f"{axis}_axis_name"
            if not isinstance(getattr(self, name), str):
                self._fail(TypeError, name, "a string")
            if not getattr(self, name):
                self._fail(ValueError, name, "a name that is not empty")
            self._check_int(f"{axis}_axis_size", -1, "-1 (all remaining devices) or a positive integer")
            if getattr(self, f"{axis}_axis_size") == 0:
                self._fail(ValueError, f"{axis}_axis_size", "-1 (all remaining devices) or a positive integer")
        names = [getattr(self, f"{axis}_axis_name") for axis in axes]
        for axis, axis_name in zip(axes, names, strict=True):
            if names.count(axis_name) > 1:
                self._fail(ValueError, f"{axis}_axis_name", "a name that no other axis has")
        unsized = [axis for axis in axes if getattr(self, f"{axis}_axis_size") == -1]
        if len(unsized) > 1:
            self._fail(ValueError, f"{unsized[1]}_axis_size", f"at most one axis of size -1 ({unsized[0]} has it)")
        for name in ("remat", "fsdp_modules"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
                self._fail(TypeError, name, "a list of module names")
            object.__setattr__(self, name, tuple(value))
        self._check_int("fsdp_min_weight_size", 0, "an integer of at least 0")
        for name in ("fsdp_gather_dtype", "fsdp_grad_scatter_dtype"):
            if getattr(self, name) is not None:
                self._check_choice(name, list(_DTYPES))
        self._check_bool("tp_async_dense")

    def require_single_device(self, module_name: str) -> None:
        """Raises NotImplementedError where this configuration asks ``module_name`` for anything that it does not do:
        an axis over several devices, activations computed again, weights sharded or gathered in another dtype, a
        threshold for sharding, communication beside the products. What it asks of other modules is theirs."""
        for axis in ("data", "fsdp", "pipeline", "model"):
            size = getattr(self, f"{axis}_axis_size")
            if size not in ((-1, 1) if axis == "data" else (1,)):
                self._fail(NotImplementedError, f"{axis}_axis_size", f"1, the only size that {module_name} has yet")
        if module_name in self.remat:
            self._fail(NotImplementedError, "remat", f"no {module_name}, which does not recompute activations yet")
        if module_name in self.fsdp_modules:
            self._fail(NotImplementedError, "fsdp_modules", f"no {module_name}, which does not shard its weights yet")
        for name in ("fsdp_min_weight_size", "fsdp_gather_dtype", "fsdp_grad_scatter_dtype", "tp_async_dense"):
            neutral = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != neutral:
                self._fail(NotImplementedError, name, f"{neutral!r}, the only value that {module_name} has yet")


@dataclass(frozen=True, kw_only=True)
class SelfAttentionConfig(_ValidatedConfig):
    """One self-attention layer.

    Raises (when made): TypeError or ValueError with the field's name, what was expected and what came.
    """

    head_dim: int = 64
    """Width of a head; the module has embedding_dim / head_dim query heads unless ``num_heads`` says otherwise."""
    qk_norm: bool = False
    """RMSNorm of q and k, per head over head_dim, before the rotary step."""
    use_bias: bool = False
    """Biases in the four projections; ``qkv_bias`` and ``out_bias`` for some of them."""
    dropout_rate: float = 0.0
    """Dropout of the output, in training only."""
    num_layers: int = 12
    """Layers of the whole model: scales the initialisation of the output projection."""
    dtype: str = "float32"
    """Of the parameters: float32, bfloat16, float16 or float64."""
    attention_backend: str = "auto"
    """See ``AttentionBackend``."""
    causal: bool = True
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    num_kv_heads: int | None = None
    """Key and value heads for grouped queries; None has as many as query heads."""
    window_left: int = -1
    """Tokens to the left that a query sees besides itself; -1 is unbounded."""
    window_right: int = -1
    softcap: float = 0.0
    """c > 0 turns the logits into c * tanh(logits / c)."""
    sinks: bool = False
    """A learned logit a head in the softmax's denominator."""
    rope_theta: float = 10000.0
    rope_pairing: str = "interleaved"
    """"interleaved" rotates the pairs (2i, 2i + 1); "half" the pairs (i, i + head_dim / 2), as Hugging Face does."""
    norm_eps: float = 1e-6
    num_heads: int | None = None
    """Query heads; None is embedding_dim / head_dim. Given, embedding_dim need not be a multiple of head_dim, nor equal
    to num_heads * head_dim."""
    qk_scale: float | None = None
    """Factor of the logits; None is 1 / sqrt(head_dim)."""
    qkv_bias: bool | None = None
    """Biases of the query, key and value projections; None is ``use_bias``."""
    out_bias: bool | None = None
    """Bias of the output projection; None is ``use_bias``."""
    norm_unit_offset: bool = False
    """The norms of q and k multiply by 1 + w, and the initial w is 0 (Gemma); see ``RMSNorm``."""
    qk_norm_scope: str = "head"
    """What ``qk_norm`` normalises: each "head", or the whole "projection" to all heads, before the split (OLMo 2)."""
    rope: bool = True
    """Whether q and k are rotated; layers without positions (NoPE: SmolLM3, Cohere2) are not."""
    rotary_dim: int | None = None
    """R, the first elements of a head, those that rotate (partial rotation); None is head_dim."""
    rope_scaling: RopeParameters | Mapping[str, Any] | None = None
    """The rotation of long contexts: ``RopeParameters``, their dictionary, or transformers' ``rope_parameters`` of one
    layer with the original length in it. What it says of ``rotary_dim`` and ``rope_theta`` counts; those fields are
    left at their defaults, or equal it. One of plain rotation ends in those two fields, with None here."""
    rope_length: int | None = None
    """The largest position plus 1 that "dynamic" and "longrope" frequencies are made for; None is S of each call. It
    never depends on the values of positions."""

    def __post_init__(self) -> None:
        self._check_int("head_dim", 2, "a positive even integer")
        if self.head_dim % 2:
            self._fail(ValueError, "head_dim", "a positive even integer")
        for name in ("qk_norm", "use_bias", "causal", "sinks", "norm_unit_offset", "rope"):
            self._check_bool(name)
        self._check_real("dropout_rate", lambda rate: 0 <= rate < 1, "a number in [0, 1)")
        self._check_int("num_layers", 1, "a positive integer")
        self._check_choice("dtype", list(_DTYPES))
        self._check_choice("attention_backend", AttentionBackend.names())
        object.__setattr__(self, "attention_backend", str(self.attention_backend))
        if isinstance(self.parallel, Mapping):
            object.__setattr__(self, "parallel", ParallelConfig.from_dict(self.parallel))
        if not isinstance(self.parallel, ParallelConfig):
            self._fail(TypeError, "parallel", "a ParallelConfig or its dictionary")
        if self.num_kv_heads is not None:
            self._check_int("num_kv_heads", 1, "None or a positive integer")
        for name in ("window_left", "window_right"):
            self._check_int(name, -1, "-1 (unbounded) or a number of tokens")
        self._check_real("softcap", lambda cap: cap >= 0, "0 (none) or a positive finite number")
        self._check_real("rope_theta", lambda theta: theta > 0, "a positive finite number")
        self._check_choice("rope_pairing", ["interleaved", "half"])
        self._check_real("norm_eps", lambda eps: eps >= 0, "a finite number of at least 0")
        if self.num_heads is not None:
            self._check_int("num_heads", 1, "None or a positive integer")
            if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
                self._fail(ValueError, "num_heads", f"a multiple of num_kv_heads {self.num_kv_heads}")
        if self.qk_scale is not None:
            self._check_real("qk_scale", lambda scale: True, "None or a finite number")
        for name in ("qkv_bias", "out_bias"):
            if getattr(self, name) is not None:
                self._check_bool(name)
        self._check_choice("qk_norm_scope", ["head", "projection"])
        if self.norm_unit_offset and not self.qk_norm:
            self._fail(ValueError, "norm_unit_offset", "False without qk_norm")
        if self.qk_norm_scope != "head" and not self.qk_norm:
            self._fail(ValueError, "qk_norm_scope", "'head' without qk_norm")

        self._check_rotation()

    def _check_rotation(self) -> None:
        for name in ("rotary_dim", "rope_scaling", "rope_length"):
            if getattr(self, name) is not None and not self.rope:
                self._fail(ValueError, name, "None where rope is False")
        expected = f"None or a positive even integer of at most head_dim {self.head_dim}"
        if self.rotary_dim is not None:
            self._check_int("rotary_dim", 2, expected)
            if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
                self._fail(ValueError, "rotary_dim", expected)
        if self.rope_scaling is not None:
            self._take_rope_scaling()
        if self.rope_length is not None:
            self._check_int("rope_length", 1, "None or a positive number of tokens")
            if self.rope_scaling is None or not self.rope_scaling.depends_on_length:
                self._fail(ValueError, "rope_length", "None unless rope_scaling depends on the length")

    def _take_rope_scaling(self) -> None:
        """Rotation is said once: ``rotary_dim``, ``rope_theta`` and ``rope_scaling`` agree from here on."""
        parameters = self.rope_scaling
        if isinstance(parameters, Mapping):
            if "rotary_dim" in parameters:
                parameters = RopeParameters.from_dict(parameters)
            else:
                has_share = parameters.get("partial_rotary_factor") is not None
                whole = self.head_dim if has_share or self.rotary_dim is None else self.rotary_dim
                parameters = RopeParameters.from_transformers({"rope_theta": self.rope_theta, **parameters}, whole)
        if not isinstance(parameters, RopeParameters):
            self._fail(TypeError, "rope_scaling", "None, RopeParameters or their dictionary")
        if parameters.rotary_dim > self.head_dim:
            self._fail(ValueError, "rope_scaling", f"a rotary_dim of at most head_dim {self.head_dim}")
        if self.rotary_dim not in (None, parameters.rotary_dim):
            self._fail(ValueError, "rotary_dim", f"None or that of rope_scaling, {parameters.rotary_dim}")
        if self.rope_theta not in (type(self).rope_theta, parameters.rope_theta):
            self._fail(ValueError, "rope_theta", f"that of rope_scaling, {parameters.rope_theta}")
        object.__setattr__(self, "rotary_dim", parameters.rotary_dim)
        object.__setattr__(self, "rope_theta", float(parameters.rope_theta))
        object.__setattr__(self, "rope_scaling", None if parameters.rope_type == "default" else parameters)

    @property
    def _dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]
