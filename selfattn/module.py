"""The self-attention layer: it holds weights and hands them to the one operator that does the work. What users wrap
around its projections and norms is called instead."""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from selfattn.config import SelfAttentionConfig
from selfattn.norm import RMSNorm
from selfattn.rope import RopeParameters


def _reset_projection(projection: nn.Linear, std: float) -> None:
    nn.init.normal_(projection.weight, std=std)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)


def _initialise_normally(projection: nn.Linear, std: float) -> None:
    """Gives one projection the layer's ``reset_parameters``: FSDP calls every module's own, in any order, and its type
    stays ``nn.Linear``, by which libraries find what they quantise."""
    projection.reset_parameters = functools.partial(_reset_projection, projection, std)


# While PyTorch traces, its own tensors stand for plain ones. By name: their modules take long to import.
_TRACING = ("torch._subclasses.fake_tensor", "torch._subclasses.functional_tensor")
_Parameter = nn.Parameter


def _is_plain_tensor(tensor: Tensor | None) -> bool:
    kind = type(tensor)
    return kind is _Parameter or kind is Tensor or kind.__module__ in _TRACING


def _is_dtensor(tensor: Tensor | None) -> bool:
    """By name: the module of DTensor takes seconds to import."""
    return type(tensor).__name__ == "DTensor"


def _refuse_cache_of_shares(cache: object) -> None:
    if cache is not None:
        raise NotImplementedError(
            "SelfAttention: cache: expected None in a layer whose heads are spread over ranks, got a KV cache, which "
            "is not divided among them yet"
        )


def _is_unwrapped(module: nn.Module | None, expected: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what ``expected`` does, and nothing else: no subclass (a parametrisation is one,
    too), no hooks, no forward of its own."""
    if type(module) is not expected:
        return False
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def _is_untouched(module: nn.Module | None, expected: type[nn.Module]) -> bool:
    """Whether ``module`` is an unwrapped one of ``expected`` without tensor subclasses as parameters. Every call of a
    layer asks this six times."""
    if not _is_unwrapped(module, expected):
        return False
    parameters = module.__dict__["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    return (type(weight) is _Parameter or _is_plain_tensor(weight)) and (bias is None or _is_plain_tensor(bias))


def _are_all_modules_hooked() -> bool:
    """Whether hooks wait for every module that is called. torch.compile knows none of them."""
    return not torch.compiler.is_compiling() and bool(_has_any_global_hook())


def _refuse_forward(request: str, *arguments: object) -> Tensor:
    raise RuntimeError(
        f"SelfAttention: config.parallel has {request}: expected selfattn.distributed.parallelize(model, mesh, "
        "config.parallel) before the first call, got a layer on one device"
    )


class SelfAttention(nn.Module):
    """Multi-head self-attention over packed documents: projections, optional RMSNorm of q and k, rotary embedding,
    attention inside each document, output projection, dropout.

    The forward pass is one call of ``torch.ops.selfattn.self_attention``, the same that the C++ module makes: a state
    dict moves between the two, and ``torch.jit.script`` gives a file that runs where there is no Python.

    What is wrapped around a projection or a norm counts: one that is no plain ``nn.Linear`` or ``nn.RMSNorm`` any more
    (LoRA, quantised or parametrised weights, hooks, a replaced module or forward) is called, and what is plain around
    it stays fused. ``torch.jit.script`` takes the layer as it then is.

    Args:
        embedding_dim: E, the width of the input and output; a multiple of ``config.head_dim``, unless
            ``config.num_heads`` is given.
        config: everything else, see ``SelfAttentionConfig``.
        device: of the parameters.
        dtype: of the parameters; None takes ``config.dtype``.

    Parameters, with NH query heads (E / head_dim if not given) and NKV key/value heads: ``q_proj.weight``
    (NH * head_dim, E), ``k_proj.weight`` and ``v_proj.weight`` (NKV * head_dim, E), ``out_proj.weight``
    (E, NH * head_dim), their ``bias`` with ``use_bias``, ``qkv_bias`` or ``out_bias``;
    ``q_norm.weight`` and ``k_norm.weight`` (head_dim,) with ``qk_norm``, or (NH * head_dim,) and (NKV * head_dim,) with
    ``qk_norm_scope="projection"``; ``sinks`` (NH,) with ``sinks``.

    Raises:
        ValueError: ``embedding_dim`` or ``num_kv_heads`` does not fit ``head_dim``.

    A layer whose ``config.parallel`` asks something of it raises RuntimeError when it is called, until
    ``selfattn.distributed.parallelize`` has done what is asked.
    """

    def __init__(
        self,
        embedding_dim: int,
        config: SelfAttentionConfig = SelfAttentionConfig(),  # noqa: B008 -- frozen
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, SelfAttentionConfig):
            raise TypeError(f"SelfAttention: config: expected a SelfAttentionConfig, got {type(config).__name__}")
        if config.num_heads is not None and embedding_dim <= 0:
            raise ValueError(f"SelfAttention: embedding_dim: expected a positive number, got {embedding_dim}")
        if config.num_heads is None and (embedding_dim <= 0 or embedding_dim % config.head_dim != 0):
            raise ValueError(
                f"SelfAttention: embedding_dim: expected a positive multiple of head_dim {config.head_dim}, "
                f"got {embedding_dim}; give config.num_heads for other widths"
            )
        num_heads = embedding_dim // config.head_dim if config.num_heads is None else config.num_heads
        num_kv_heads = num_heads if config.num_kv_heads is None else config.num_kv_heads
        if num_heads % num_kv_heads != 0:
            raise ValueError(
                f"SelfAttention: config.num_kv_heads: expected a divisor of the {num_heads} query heads "
                f"(embedding_dim {embedding_dim} / head_dim {config.head_dim}), got {num_kv_heads}"
            )

        self.parallel = config.parallel
        request = config.parallel.request_to("SelfAttention")
        # Called in the place of the forward pass; selfattn.distributed sets it, and takes the refusal away.
        self._parallel_forward = None if request is None else functools.partial(_refuse_forward, request)
        # selfattn.distributed sets both: whether calls without a context are refused, and how keys travel.
        self.needs_context = False
        self.context_method = config.parallel.context_method
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        self.use_bias = config.use_bias
        self.dropout_rate = float(config.dropout_rate)
        self.num_layers = config.num_layers
        self.attention_backend = config.attention_backend
        self.causal = config.causal
        self.window_left = config.window_left
        self.window_right = config.window_right
        self.softcap = float(config.softcap)
        self.rope_theta = float(config.rope_theta)
        self.rope_pairing = config.rope_pairing
        self.norm_eps = float(config.norm_eps)
        self.rope = config.rope
        self.rotary_dim = config.head_dim if config.rotary_dim is None else config.rotary_dim
        self.rope_scaling = config.rope_scaling
        self.rope_length: int | None = config.rope_length
        self.makes_tables = config.rope and (self.rotary_dim != config.head_dim or config.rope_scaling is not None)
        # Each field by itself, for TorchScript.
        for name, value in self.rope_parameters()._type_fields().items():
            setattr(self, name if name.startswith("rope_") else f"rope_{name}", value)
        self.norm_unit_offset = config.norm_unit_offset
        self.normalises_projections = config.qk_norm_scope == "projection"
        self.qk_scale: float | None = None if config.qk_scale is None else float(config.qk_scale)

        placed = {"device": device, "dtype": config._dtype if dtype is None else dtype}
        q_dim, kv_dim = num_heads * config.head_dim, num_kv_heads * config.head_dim
        qkv_bias = config.use_bias if config.qkv_bias is None else config.qkv_bias
        out_bias = config.use_bias if config.out_bias is None else config.out_bias
        self.q_proj = nn.Linear(embedding_dim, q_dim, bias=qkv_bias, **placed)
        self.k_proj = nn.Linear(embedding_dim, kv_dim, bias=qkv_bias, **placed)
        self.v_proj = nn.Linear(embedding_dim, kv_dim, bias=qkv_bias, **placed)
        self.out_proj = nn.Linear(q_dim, embedding_dim, bias=out_bias, **placed)
        make_norm = functools.partial(RMSNorm, unit_offset=True) if config.norm_unit_offset else nn.RMSNorm
        q_normed, k_normed = (q_dim, kv_dim) if self.normalises_projections else (config.head_dim, config.head_dim)
        self.q_norm = make_norm(q_normed, eps=self.norm_eps, **placed) if config.qk_norm else None
        self.k_norm = make_norm(k_normed, eps=self.norm_eps, **placed) if config.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(num_heads, **placed)) if config.sinks else None
        std = math.sqrt(2 / (5 * embedding_dim))
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            _initialise_normally(projection, std)
        out_std = 2 / (2 * config.num_layers) / math.sqrt(embedding_dim)
        _initialise_normally(self.out_proj, out_std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """q, k, v: normal with standard deviation sqrt(2 / (5 E)) (small init: Nguyen and Salazar, arXiv:1910.05895);
        out: normal with 2 / (2 num_layers) / sqrt(E), two residual blocks a layer (Wang and Komatsuzaki 2021,
        mesh-transformer-jax). Both as GPT-NeoX has them (arXiv:2204.06745). Biases and sinks 0, norm weights 1."""
        for module in (self.q_proj, self.k_proj, self.v_proj, self.out_proj, self.q_norm, self.k_norm):
            if module is not None:
                module.reset_parameters()
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    @classmethod
    def from_pretrained_layer(cls, module: nn.Module, *, copy: bool | None = None) -> "SelfAttention":
        """The layer that computes what an attention module of transformers computes, without its cache.

        Everything is read from ``module``, its ``config`` and its ``layer_idx``: heads, scale, window, softcap, norms,
        sinks, rotation. docs/pretrained_layers.md lists the classes, and what the layer is given in place of masks and
        position embeddings. transformers is not imported.

        Args:
            module: e.g. ``model.model.layers[0].self_attn``, of exactly a class that is known.
            copy: None shares the parameters (the same ``nn.Parameter`` objects: training the layer trains ``module``)
                where it can, and copies the parts of one fused projection. True copies all, with what is wrapped around
                them. False shares all, or raises. A projection or norm that is not plain (LoRA, quantised weights,
                hooks) is shared, or copied, as a module.

        Returns:
            The layer, of ``module``'s mode (training or evaluation), dtype, device and ``requires_grad``.

        Raises:
            TypeError: ``module`` is no module, ``copy`` no bool.
            ValueError: a fused projection with ``copy=False``, or with something wrapped around it; hooks around the
                whole of ``module``; weights or fields that do not fit its configuration.
            NotImplementedError: an unknown class; attention dropout; what the layer does not do (chunks, gates, clipped
                projections, latent attention, both directions, ...), named.
        """
        from selfattn.integrations._transformers_layers import from_pretrained_layer

        return from_pretrained_layer(cls, module, copy=copy)

    @torch.jit.unused
    def rope_parameters(self) -> RopeParameters:
        """How q and k are rotated where ``forward`` is not given ``freqs``: for tables of other positions."""
        if self.rope_scaling is not None:
            return self.rope_scaling
        return RopeParameters(rotary_dim=self.rotary_dim, rope_theta=self.rope_theta)

    def forward(
        self,
        x: Tensor,
        freqs: tuple[Tensor, Tensor] | None = None,
        segment_ids: Tensor | None = None,
        cache: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None,
        context: Any | None = None,
    ) -> Tensor:
        """Attention of every token to the allowed tokens of its document, or with ``cache`` to those of its row there.

        Args:
            x: (B, S, E).
            freqs: (sin, cos) of ``precompute_freqs`` or ``RopeParameters.tables``, each (1 or B, S, R / 2) with
                R <= head_dim. None takes positions 0..S-1: for packed rows pass those of each document's own positions.
                With ``cache`` None takes each token's slot.
            segment_ids: (B, S) int32 or int64; equal ids attend to each other, negative ids are padding. None is one
                document a row. With ``cache`` they are the rows of the cache, and None is row b for batch b.
            cache: ``KVCache.layer(i)``. The tokens' keys and values are written behind the ``lengths`` of their rows,
                before they are read; ``lengths`` stay what they are (``KVCache.advance``). Under ``torch.no_grad()``.
            context: ``selfattn.distributed.ContextLayout`` of rows whose tokens are spread over ranks: x holds this
                rank's, (B, L, E), and so do ``freqs``, (1 or B, L, R / 2). Then ``freqs`` None takes positions in the
                whole row (``ContextLayout.freqs`` has those of documents), ``segment_ids`` None or the layout's own.

        Returns:
            (B, S, E), of x's dtype.

        Raises:
            TypeError, ValueError: a bad argument; as ``append_kv_cache`` for the values of a cache's integers.
            RuntimeError: ``cache``, and a weight that requires a gradient outside of ``torch.no_grad()``.
            NotImplementedError: ``context`` beside a cache, or in TorchScript.
        """
        if torch.jit.is_scripting():
            if context is not None:
                raise NotImplementedError("SelfAttention: context: expected None in TorchScript, got a layout")
        else:
            if context is not None:
                freqs = self._check_context(x, freqs, segment_ids, cache, context)
                segment_ids = context.segment_ids
            elif self.needs_context:
                raise ValueError(
                    "SelfAttention: context: expected a ContextLayout in a layer whose rows are spread over ranks "
                    f"(context_axis_size {self.parallel.context_axis_size}), got None"
                )
            if self._parallel_forward is not None:
                _refuse_cache_of_shares(cache)
                return self._parallel_forward(self, x, freqs, segment_ids, context)
        freqs_sin: Tensor | None = None
        freqs_cos: Tensor | None = None
        if freqs is not None:
            freqs_sin, freqs_cos = freqs
        elif self.makes_tables:
            positions = None if cache is None else self._find_slots(x, segment_ids, cache)
            freqs_sin, freqs_cos = self._make_tables(x, positions)
        if torch.jit.is_scripting():
            if self._script_calls_parts:
                return self._compose_in_script(x, freqs_sin, freqs_cos, segment_ids, cache)
        elif context is not None or not self._is_plain():
            return self._compose(x, freqs_sin, freqs_cos, segment_ids, cache, context)
        q_norm_weight, k_norm_weight, norm_eps = self._plain_norms()
        if cache is not None:
            keys, values, lengths, page_table = cache
            out = torch.ops.selfattn.self_attention_kv_cache(
                x,
                self.q_proj.weight,
                self.k_proj.weight,
                self.v_proj.weight,
                self.out_proj.weight,
                self.q_proj.bias,
                self.k_proj.bias,
                self.v_proj.bias,
                self.out_proj.bias,
                q_norm_weight,
                k_norm_weight,
                self.sinks,
                freqs_sin,
                freqs_cos,
                segment_ids,
                head_dim=self.head_dim,
                norm_eps=norm_eps,
                rope_theta=self.rope_theta,
                rope_pairing=self.rope_pairing,
                causal=self.causal,
                qk_scale=self.qk_scale,
                backend=self.attention_backend,
                window_left=self.window_left,
                window_right=self.window_right,
                softcap=self.softcap,
                rope=self.rope,
                k_cache=keys,
                v_cache=values,
                lengths=lengths,
                page_table=page_table,
            )
            return nn.functional.dropout(out, self.dropout_rate, self.training)
        return torch.ops.selfattn.self_attention(
            x,
            self.q_proj.weight,
            self.k_proj.weight,
            self.v_proj.weight,
            self.out_proj.weight,
            self.q_proj.bias,
            self.k_proj.bias,
            self.v_proj.bias,
            self.out_proj.bias,
            q_norm_weight,
            k_norm_weight,
            self.sinks,
            freqs_sin,
            freqs_cos,
            segment_ids,
            head_dim=self.head_dim,
            norm_eps=norm_eps,
            rope_theta=self.rope_theta,
            rope_pairing=self.rope_pairing,
            causal=self.causal,
            qk_scale=self.qk_scale,
            backend=self.attention_backend,
            window_left=self.window_left,
            window_right=self.window_right,
            softcap=self.softcap,
            rope=self.rope,
            dropout_rate=self.dropout_rate,
            training=self.training,
        )

    def _find_slots(
        self, x: Tensor, segment_ids: Tensor | None, cache: tuple[Tensor, Tensor, Tensor, Tensor | None]
    ) -> Tensor:
        """The slot (B, S) at which each token is written: the position that its tables are made for."""
        if self.rope_length is None and (self.rope_type == "dynamic" or self.rope_type == "longrope"):
            raise ValueError(
                "SelfAttention: config.rope_length: expected a length, so that all keys of a cache are rotated by the "
                f"same frequencies of rope_type {self.rope_type}, got None"
            )
        keys, _, lengths, page_table = cache
        capacity = keys.size(1) if page_table is None else keys.size(1) * page_table.size(1)
        return torch.ops.selfattn.positions_of_append(lengths, segment_ids, x.size(1), capacity)[1]

    @torch.jit.unused
    def _check_context(
        self, x: Tensor, freqs: tuple[Tensor, Tensor] | None, segment_ids: Tensor | None, cache: Any, context: Any
    ) -> tuple[Tensor, Tensor] | None:
        """The tables: those of the layout's positions where none are given."""
        from selfattn.distributed import ContextLayout

        if not isinstance(context, ContextLayout):
            raise TypeError(f"SelfAttention: context: expected a ContextLayout, got {type(context).__name__}")
        if cache is not None:
            raise NotImplementedError("SelfAttention: cache: expected None beside a context, got a KV cache")
        if segment_ids is not None and segment_ids is not context.segment_ids:
            raise ValueError(
                "SelfAttention: segment_ids: expected None or the context's own tensor, which its documents are dealt "
                f"by, got another of shape {tuple(segment_ids.shape)}"
            )
        if freqs is not None or not self.rope:
            return freqs
        length = self.rope_length or context.slots.shape[1]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return self.rope_parameters().tables(context.positions, length, dtype=dtype)

    def _make_tables(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the positions, or of 0..S-1: operators without tables rotate whole heads, by ``rope_theta`` alone."""
        return torch.ops.selfattn.rope_tables(
            self.rotary_dim,
            positions,
            x.size(1) if positions is None else None,
            rope_type=self.rope_type,
            rope_theta=self.rope_theta,
            length=self.rope_length,
            factor=self.rope_factor,
            original_max_position_embeddings=self.rope_original_max_position_embeddings,
            low_freq_factor=self.rope_low_freq_factor,
            high_freq_factor=self.rope_high_freq_factor,
            attention_factor=self.rope_attention_factor,
            beta_fast=self.rope_beta_fast,
            beta_slow=self.rope_beta_slow,
            mscale=self.rope_mscale,
            mscale_all_dim=self.rope_mscale_all_dim,
            truncate=self.rope_truncate,
            short_factor=self.rope_short_factor,
            long_factor=self.rope_long_factor,
            dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
            device=x.device,
        )

    # TorchScript compiles one of two forward passes, as the layer is when it is scripted.
    __constants__ = (
        "_script_calls_parts",
        "_script_fuses_norms",
        "norm_unit_offset",
        "normalises_projections",
        "makes_tables",
    )
    _script_calls_parts = False
    _script_fuses_norms = True

    def __prepare_scriptable__(self) -> "SelfAttention":
        if self._parallel_forward is not None:
            raise NotImplementedError("SelfAttention: TorchScript: expected a layer on one device, got a parallel one")
        self._script_calls_parts = not self._is_plain()
        self._script_fuses_norms = self._norms_are_plain()
        return self

    @torch.jit.unused
    def _is_plain(self) -> bool:
        """Whether one operator does what calling every submodule would do."""
        modules = self.__dict__["_modules"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            if not _is_untouched(modules[name], nn.Linear):
                return False
        return self._norms_are_plain() and not _are_all_modules_hooked()

    def _norms_are_plain(self) -> bool:
        """Whether there are norms that the operator can apply, or none."""
        modules = self.__dict__["_modules"]
        q_norm, k_norm = modules.get("q_norm"), modules.get("k_norm")
        if q_norm is None and k_norm is None:
            return True
        if self.normalises_projections:  # which the operator does not
            return False
        kind = RMSNorm if self.norm_unit_offset else nn.RMSNorm
        if not (_is_untouched(q_norm, kind) and _is_untouched(k_norm, kind)):
            return False
        if self.norm_unit_offset and not (q_norm.unit_offset and k_norm.unit_offset):
            return False
        shape = (self.head_dim,)
        return (
            q_norm.eps is not None
            and q_norm.eps == k_norm.eps
            and q_norm.normalized_shape == k_norm.normalized_shape == shape
            and q_norm.elementwise_affine
            and k_norm.elementwise_affine
        )

    def _plain_norms(self) -> tuple[Tensor | None, Tensor | None, float]:
        """The weights and the eps of norms that an operator applies."""
        q_norm_weight: Tensor | None = None
        k_norm_weight: Tensor | None = None
        norm_eps = self.norm_eps
        if self.q_norm is not None and self.k_norm is not None:
            if self.norm_unit_offset:
                q_norm_weight, k_norm_weight = self.q_norm.factor(), self.k_norm.factor()
            else:
                q_norm_weight, k_norm_weight = self.q_norm.weight, self.k_norm.weight
            norm_eps = self.q_norm.eps
        return q_norm_weight, k_norm_weight, norm_eps

    @torch.jit.unused
    def _compose(
        self,
        x: Tensor,
        freqs_sin: Tensor | None,
        freqs_cos: Tensor | None,
        ids: Tensor | None,
        cache: tuple[Tensor, Tensor, Tensor, Tensor | None] | None,
        context: Any,
    ) -> Tensor:
        """The forward pass by parts: what is plain stays fused, and every other submodule is called."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        self._check_sharded(x)
        calls_any = _are_all_modules_hooked()
        if not calls_any and all(_is_untouched(projection, nn.Linear) for projection in projections):
            weights, biases = zip(*((p.weight, p.bias) for p in projections), strict=True)
            q, k, v = torch.ops.selfattn.project_query_key_value(x, *weights, *biases)
        else:
            q, k, v = (projection(x) for projection in projections)
            if _is_dtensor(q) or _is_dtensor(self.q_proj._parameters.get("weight")):
                from selfattn.distributed._dtensor import heads_as_dtensors

                q, k, v = heads_as_dtensors(projections, (q, k, v), self.head_dim)
        if not calls_any and self._norms_are_plain():
            norms = self._plain_norms()
        else:
            q, k = self._call_norms(q, k)
            norms = (None, None, self.norm_eps)
        sinks = self.sinks
        if _is_dtensor(q):
            _refuse_cache_of_shares(cache)
            if context is not None:
                raise NotImplementedError(
                    "SelfAttention: context: expected None in a layer spread by ColwiseParallel and RowwiseParallel, "
                    "got a layout; selfattn.distributed.TensorParallel takes one"
                )
            from selfattn.distributed._dtensor import replicated, sinks_of

            shared = (*norms[:2], freqs_sin, freqs_cos, ids)
            *weights, freqs_sin, freqs_cos, ids = (replicated(tensor, q.device_mesh) for tensor in shared)
            norms, sinks = (*weights, norms[2]), sinks_of(sinks, q)
        if context is None:
            attended = self._attend(q, k, v, norms, sinks, freqs_sin, freqs_cos, ids, cache)
        else:
            attended = self._attend_in_context(q, k, v, norms, sinks, freqs_sin, freqs_cos, context)
        return nn.functional.dropout(self.out_proj(attended), self.dropout_rate, self.training)

    def _check_sharded(self, x: Tensor) -> None:
        """Throws where sharded weights would meet a plain x without a plan that shards it."""
        if _is_dtensor(x):
            return
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            projection = self._modules[name]
            if not projection._forward_pre_hooks and _is_dtensor(projection._parameters.get("weight")):
                raise TypeError(
                    f"SelfAttention: {name}.weight is a DTensor and x is none: expected fully_shard of the layer or "
                    "model, which is then called as a whole, selfattn.distributed.TensorParallel, or ColwiseParallel "
                    "and RowwiseParallel of every projection"
                )

    def _compose_in_script(
        self,
        x: Tensor,
        freqs_sin: Tensor | None,
        freqs_cos: Tensor | None,
        segment_ids: Tensor | None,
        cache: tuple[Tensor, Tensor, Tensor, Tensor | None] | None,
    ) -> Tensor:
        """``_compose`` for TorchScript: what is plain was found out when the layer was scripted."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self._script_fuses_norms:
            attended = self._attend(q, k, v, self._plain_norms(), self.sinks, freqs_sin, freqs_cos, segment_ids, cache)
        else:
            q, k = self._call_norms(q, k)
            norms = (None, None, self.norm_eps)
            attended = self._attend(q, k, v, norms, self.sinks, freqs_sin, freqs_cos, segment_ids, cache)
        return nn.functional.dropout(self.out_proj(attended), self.dropout_rate, self.training)

    def _call_norms(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Of heads, or of whole projections; (B, S, heads * head_dim) each."""
        if self.normalises_projections:
            if self.q_norm is not None:
                q = self.q_norm(q)
            if self.k_norm is not None:
                k = self.k_norm(k)
        else:
            if self.q_norm is not None:
                q = self.q_norm(q.unflatten(-1, [-1, self.head_dim])).flatten(-2)
            if self.k_norm is not None:
                k = self.k_norm(k.unflatten(-1, [-1, self.head_dim])).flatten(-2)
        return q, k

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: tuple[Tensor | None, Tensor | None, float],
        sinks: Tensor | None,
        freqs_sin: Tensor | None,
        freqs_cos: Tensor | None,
        segment_ids: Tensor | None,
        cache: tuple[Tensor, Tensor, Tensor, Tensor | None] | None,
    ) -> Tensor:
        """What comes between the projections, with norms of ``_plain_norms`` that are yet to be applied."""
        q_norm_weight, k_norm_weight, norm_eps = norms
        if cache is None:
            return torch.ops.selfattn.projected_attention(
                q,
                k,
                v,
                q_norm_weight,
                k_norm_weight,
                sinks,
                freqs_sin,
                freqs_cos,
                segment_ids,
                head_dim=self.head_dim,
                norm_eps=norm_eps,
                rope_theta=self.rope_theta,
                rope_pairing=self.rope_pairing,
                causal=self.causal,
                qk_scale=self.qk_scale,
                backend=self.attention_backend,
                window_left=self.window_left,
                window_right=self.window_right,
                softcap=self.softcap,
                rope=self.rope,
            )
        keys, values, lengths, page_table = cache
        return torch.ops.selfattn.projected_attention_kv_cache(
            q,
            k,
            v,
            q_norm_weight,
            k_norm_weight,
            sinks,
            freqs_sin,
            freqs_cos,
            segment_ids,
            head_dim=self.head_dim,
            norm_eps=norm_eps,
            rope_theta=self.rope_theta,
            rope_pairing=self.rope_pairing,
            causal=self.causal,
            qk_scale=self.qk_scale,
            backend=self.attention_backend,
            window_left=self.window_left,
            window_right=self.window_right,
            softcap=self.softcap,
            rope=self.rope,
            k_cache=keys,
            v_cache=values,
            lengths=lengths,
            page_table=page_table,
        )

    @torch.jit.unused
    def _attend_in_context(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: tuple[Tensor | None, Tensor | None, float],
        sinks: Tensor | None,
        freqs_sin: Tensor | None,
        freqs_cos: Tensor | None,
        context: Any,
    ) -> Tensor:
        """``_attend`` over the ranks of a layout."""
        from selfattn.distributed import context_parallel_attention

        q_norm_weight, k_norm_weight, norm_eps = norms
        q, k, v = (tensor.unflatten(-1, (-1, self.head_dim)) for tensor in (q, k, v))
        if q_norm_weight is not None or self.rope:
            q, k = torch.ops.selfattn.qk_norm_rope(
                q,
                k,
                q_norm_weight,
                k_norm_weight,
                freqs_sin,
                freqs_cos,
                norm=q_norm_weight is not None,
                eps=norm_eps,
                rope=self.rope,
                pairing=self.rope_pairing,
            )
        out = context_parallel_attention(
            q,
            k,
            v,
            context,
            method=self.context_method,
            causal=self.causal,
            qk_scale=self.qk_scale,
            backend=self.attention_backend,
            window_left=self.window_left,
            window_right=self.window_right,
            softcap=self.softcap,
            sinks=sinks,
        )
        return out.flatten(2)

    def extra_repr(self) -> str:
        parts = [f"{self.embedding_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        parts.append(f"causal={self.causal}")
        defaults = SelfAttentionConfig()
        for name in (
            "qk_scale",
            "window_left",
            "window_right",
            "softcap",
            "rope_theta",
            "rope_pairing",
            "rope",
            "rope_scaling",
            "rope_length",
            "dropout_rate",
        ):
            if getattr(self, name) != getattr(defaults, name):
                parts.append(f"{name}={getattr(self, name)}")
        if self.rotary_dim != self.head_dim:
            parts.append(f"rotary_dim={self.rotary_dim}")
        if self.sinks is not None:
            parts.append("sinks=True")
        parts.append(f"backend={self.attention_backend}")
        return ", ".join(parts)
