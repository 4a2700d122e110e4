"""What a self-attention layer is, as data: validated when made, and written to and read from plain dictionaries."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from selfattn._validated_config import _ValidatedConfig
from selfattn.rope import RopeParameters

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from selfattn.distributed import ContextLayout

_AXES = ("pipeline", "data", "fsdp", "context", "model")
"""Of the device mesh, as the fields of ``ParallelConfig`` name them."""

_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


class AttentionBackend(str, Enum):
    """The backends of ``multihead_attention``; each member is also the string that the operator takes.

    ``PALLAS_TRITON``, ``TRITON`` and ``XLA`` are the names that JAX code bases use: aliases of the same members, so
    ``AttentionBackend("xla") is AttentionBackend.ATEN``.
    """

    AUTO = "auto"
    """The first of the others, in this order, that can serve a call."""
    FLASH = "flash"
    """This project's kernels, on the CPU and on CUDA."""
    CUDNN = "cudnn"
    """ATen's cuDNN attention."""
    ATEN = "aten"
    """``F.scaled_dot_product_attention``, with a mask where one is needed."""
    REFERENCE = "reference"
    """The formula in ATen operators."""

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
    """How a model is spread over devices: ``selfattn.distributed.parallelize`` does it (docs/distributed.md).

    The fields are those that JAX code bases have. The names of the axes ask for nothing by themselves.
    """

    data_axis_name: str = "dp"
    """Ranks with other data and the same weights."""
    fsdp_axis_name: str = "fsdp"
    """Ranks with other data and a shard of each weight."""
    pipeline_axis_name: str = "pp"
    model_axis_name: str = "tp"
    """Ranks with the same data and some of the heads."""
    context_axis_name: str = "cp"
    data_axis_size: int = -1
    """-1 takes every device that the other axes leave: on one device, one."""
    fsdp_axis_size: int = 1
    pipeline_axis_size: int = 1
    """Above 1 for the mesh alone: pipelines of whole models are built with torch.distributed.pipelining."""
    model_axis_size: int = 1
    context_axis_size: int = 1
    """Ranks that share the rows of a batch, each with some tokens of every row (``context_layout``)."""
    context_heads_size: int = 1
    """Of those, how many next to each other, in one node, exchange heads; keys then travel between such groups. It
    divides ``context_axis_size``. Above 1 the context is two axes of the mesh, ``context_axis_name`` with "_keys" and
    "_heads" behind it."""
    remat: Sequence[str] = ()
    """Class names of the modules whose activations are computed again in the backward pass."""
    fsdp_modules: Sequence[str] = ()
    """Class names of the modules whose weights are gathered together; what is left is gathered for the whole model."""
    fsdp_min_weight_size: int = 2**18
    """Elements of the smallest weight that the fsdp axis shards. Smaller ones stay whole on every rank, in their own
    dtype."""
    fsdp_gather_dtype: str | None = None
    """In which sharded weights are gathered, and computed with; None is their own."""
    fsdp_grad_scatter_dtype: str | None = None
    """In which their gradients are added up and scattered; None is that of the gradients."""
    tp_async_dense: bool = False
    """Whether communication of the model axis runs beside the matrix products."""
    context_method: str = "auto"
    """How keys and values of documents on several ranks of the context axis meet their queries: "keys", "heads" or
    "auto", as ``context_parallel_attention`` has them."""
    context_balance: str = "documents"
    """Which tokens a rank of the context axis has: "documents", "head_tail" or "contiguous" (``ContextLayout``)."""

    def __post_init__(self) -> None:
        for axis in _AXES:
            name = f"{axis}_axis_name"
            if not isinstance(getattr(self, name), str):
                self._fail(TypeError, name, "a string")
            if not getattr(self, name):
                self._fail(ValueError, name, "a name that is not empty")
            self._check_int(f"{axis}_axis_size", -1, "-1 (all remaining devices) or a positive integer")
            if getattr(self, f"{axis}_axis_size") == 0:
                self._fail(ValueError, f"{axis}_axis_size", "-1 (all remaining devices) or a positive integer")
        self._check_int("context_heads_size", 1, "a positive integer")
        if self.context_axis_size != -1 and self.context_axis_size % self.context_heads_size:
            self._fail(ValueError, "context_heads_size", f"a divisor of context_axis_size {self.context_axis_size}")
        names = self.axis_names
        for axis in _AXES:
            if any(names.count(name) > 1 for name in self._names_of(axis)):
                self._fail(ValueError, f"{axis}_axis_name", "a name that no other axis has")
        unsized = [axis for axis in _AXES if getattr(self, f"{axis}_axis_size") == -1]
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
        self._check_choice("context_method", ["auto", "keys", "heads"])
        if self.context_method == "heads" and self.context_heads_size > 1:
            self._fail(ValueError, "context_method", "'auto' or 'keys' beside a context_heads_size above 1")
        self._check_choice("context_balance", ["documents", "head_tail", "contiguous"])

    def request_to(self, module_name: str) -> str | None:
        """The first field that asks something of ``module_name``, with its value, or None: an axis over several
        devices, activations computed again, weights sharded or gathered in another dtype, a threshold for sharding,
        communication beside the products. What is asked of other modules is theirs."""
        for axis in _AXES:
            if getattr(self, f"{axis}_axis_size") > 1:
                return self._field(f"{axis}_axis_size")
        for name in ("remat", "fsdp_modules"):
            if module_name in getattr(self, name):
                return self._field(name)
        for name in ("fsdp_min_weight_size", "fsdp_gather_dtype", "fsdp_grad_scatter_dtype", "tp_async_dense"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                return self._field(name)
        return None

    def _field(self, name: str) -> str:
        return f"{name} {getattr(self, name)!r}"

    def require_single_device(self, module_name: str) -> None:
        """Deprecated: ``request_to`` says what is asked of a module. Raises NotImplementedError where something is."""
        warnings.warn("ParallelConfig.require_single_device: use request_to", DeprecationWarning, stacklevel=2)
        if (request := self.request_to(module_name)) is not None:
            raise NotImplementedError(f"ParallelConfig: expected nothing asked of {module_name}, got {request}")

    def context_layout(self, segment_ids: "Tensor", mesh: "DeviceMesh", **options: Any) -> "ContextLayout":
        """``ContextLayout.from_segment_ids`` over the context axis of ``device_mesh``, with ``context_balance``.

        Args:
            segment_ids: (B, S), of whole rows, the same on every rank of the axis.
            mesh: of ``device_mesh``.
            options: of ``from_segment_ids``.
        """
        from selfattn.distributed import ContextLayout  # takes seconds to import

        axes = tuple(mesh[name] for name in reversed(self._names_of("context")))
        return ContextLayout.from_segment_ids(
            segment_ids, axes[0] if len(axes) == 1 else axes, self.context_balance, **options
        )

    def _names_of(self, axis: str) -> tuple[str, ...]:
        """Of one of ``_AXES``, in the mesh."""
        name = getattr(self, f"{axis}_axis_name")
        if axis == "context" and self.context_heads_size > 1:
            return f"{name}_keys", f"{name}_heads"
        return (name,)

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Of the mesh, from the slowest to the fastest: pipeline, data, fsdp, context (two where ``context_heads_size``
        is above 1), model."""
        return tuple(name for axis in _AXES for name in self._names_of(axis))

    def device_mesh(self, device_type: str) -> "DeviceMesh":
        """The mesh of ``axis_names`` over every rank of the job, axes of size 1 too.

        Under torchrun, this begins the default process group (NCCL for "cuda", Gloo for "cpu") where there is none.

        Args:
            device_type: "cuda" or "cpu".

        Raises:
            RuntimeError: no process group, and no ``WORLD_SIZE`` in the environment, or PyTorch without
                ``torch.distributed``.
            ValueError: the sizes do not make the number of ranks.
        """
        distributed = torch.distributed
        if not distributed.is_available():
            raise RuntimeError("ParallelConfig.device_mesh: expected a PyTorch with torch.distributed, got one without")
        if distributed.is_initialized():
            ranks = distributed.get_world_size()
        elif "WORLD_SIZE" in os.environ:
            ranks = int(os.environ["WORLD_SIZE"])
        else:
            raise RuntimeError(
                "ParallelConfig.device_mesh: expected a process group, or WORLD_SIZE in the environment (torchrun sets "
                "it), got neither"
            )
        sizes = {f"{axis}_axis_size": getattr(self, f"{axis}_axis_size") for axis in _AXES}
        known = math.prod(size for size in sizes.values() if size != -1)
        left = ranks // known
        if left * known != ranks or (left != 1 and -1 not in sizes.values()):
            said = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"ParallelConfig: expected axes whose sizes make {ranks} ranks, got {said}")
        from torch.distributed.device_mesh import init_device_mesh  # takes seconds to import

        shape = [left if size == -1 else size for size in sizes.values()]
        if self.context_heads_size > 1:
            context = _AXES.index("context")
            keys_size, rest = divmod(shape[context], self.context_heads_size)
            if rest:
                raise ValueError(
                    f"ParallelConfig: expected a context axis whose ranks context_heads_size {self.context_heads_size} "
                    f"divides, got {shape[context]}"
                )
            shape[context : context + 1] = keys_size, self.context_heads_size
        return init_device_mesh(device_type, tuple(shape), mesh_dim_names=self.axis_names)


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
    """No token sees a later one."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the layer is spread over devices, or its dictionary."""
    num_kv_heads: int | None = None
    """Key and value heads for grouped queries; None has as many as query heads."""
    window_left: int = -1
    """Tokens to the left that a query sees besides itself; -1 is unbounded."""
    window_right: int = -1
    """The same to the right."""
    softcap: float = 0.0
    """c > 0 turns the logits into c * tanh(logits / c)."""
    sinks: bool = False
    """A learned logit a head in the softmax's denominator."""
    rope_theta: float = 10000.0
    """Base of the frequencies of the rotary embedding."""
    rope_pairing: str = "interleaved"
    """"interleaved" rotates the pairs (2i, 2i + 1); "half" the pairs (i, i + head_dim / 2), as Hugging Face does."""
    norm_eps: float = 1e-6
    """Added to the mean square."""
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
