"""Tensor parallelism of one layer: each rank holds some of its heads, and computes with plain local tensors."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from selfattn.distributed._agreement import check_agreement, content_of
from selfattn.distributed._collectives import RankGroup
from selfattn.distributed._projections import ProjectInput, ProjectOutput, SumOverRanks
from selfattn.module import SelfAttention, _is_unwrapped
from selfattn.norm import RMSNorm, norm_factor


class TensorParallel(ParallelStyle):
    """A plan for ``parallelize_module`` that spreads the heads of a ``SelfAttention`` over the ranks of a mesh axis.

    The parameters become DTensors: query, key and value projections and sinks are sharded by heads, the output
    projection by its input features, norms are replicated. With fewer key heads than ranks, the key and value
    projections are replicated and each rank uses one head of them; their gradients are sums over ranks. The layer takes
    and gives plain tensors, and computes with its shards. One sum over ranks ends the forward pass, one the backward
    pass.

    Segment ids and ``freqs`` are those of the whole row on every rank. Every rank of the axis needs the same input;
    with dropout the same seed, too, unless ``sequence_parallel``. Errors come when the plan is applied.

    Args:
        sequence_parallel: the layer takes and gives (B, S / n, E), of n ranks the one's shard of the sequence, in the
            order of ranks.
        overlap: collectives run beside the products that do not need their results; False ends each where it starts.

    Raises:
        TypeError: the module is no ``SelfAttention``, or something is wrapped around its projections or norms.
        ValueError: a mesh of several dimensions; n does not divide the query heads; key heads and n do not divide each
            other; the layer is parallel already, or its ``config.parallel`` asks for what ``parallelize`` does.
    """

    def __init__(self, *, sequence_parallel: bool = False, overlap: bool = True) -> None:
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.overlap = overlap

    def __repr__(self) -> str:
        return f"TensorParallel(sequence_parallel={self.sequence_parallel}, overlap={self.overlap})"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check_layer(module, device_mesh)
        placements = _placements(module, device_mesh.size())
        for name, parameter in list(module.named_parameters()):
            owner_name, _, leaf = name.rpartition(".")
            shard = distribute_tensor(
                parameter.detach(), device_mesh, [placements[name]], src_data_rank=self.src_data_rank
            )
            owner = module.get_submodule(owner_name)
            owner.register_parameter(leaf, nn.Parameter(shard, requires_grad=parameter.requires_grad))
        group = RankGroup.of_mesh(device_mesh, self.overlap)
        module._parallel_forward = HeadsForward(
            group, device_mesh, self.sequence_parallel, _own_key_rows(module, group)
        )
        return module


def _placements(layer: SelfAttention, ranks: int) -> dict[str, Placement]:
    keys = Shard(0) if layer.num_kv_heads % ranks == 0 else Replicate()
    norms_are_split = layer.normalises_projections
    return {
        "sinks": Shard(0),
        "q_proj.weight": Shard(0),
        "q_proj.bias": Shard(0),
        "k_proj.weight": keys,
        "k_proj.bias": keys,
        "v_proj.weight": keys,
        "v_proj.bias": keys,
        "q_norm.weight": Shard(0) if norms_are_split else Replicate(),
        "k_norm.weight": keys if norms_are_split else Replicate(),
        "out_proj.weight": Shard(1),
        "out_proj.bias": Replicate(),
    }


def _own_key_rows(layer: SelfAttention, group: RankGroup) -> tuple[int, int] | None:
    """The rows of replicated key and value projections that this rank uses; None where they are sharded."""
    if layer.num_kv_heads % group.size == 0:
        return None
    return group.rank * layer.num_kv_heads // group.size * layer.head_dim, layer.head_dim


def _check_layer(layer: nn.Module, mesh: DeviceMesh) -> None:
    if not isinstance(layer, SelfAttention):
        raise TypeError(f"TensorParallel: module: expected a SelfAttention, got {type(layer).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"TensorParallel: device_mesh: expected one dimension, as mesh['tp'] has, got {mesh}")
    if layer._parallel_forward is not None:
        request = layer.parallel.request_to("SelfAttention")
        raise ValueError(
            "TensorParallel: module: expected a layer that is not parallel yet, and whose config.parallel leaves "
            "nothing to selfattn.distributed.parallelize, got "
            + ("one that is parallel" if request is None else f"config.parallel with {request}")
        )
    _check_unwrapped(layer)
    heads, kv_heads, ranks = layer.num_heads, layer.num_kv_heads, mesh.size()
    if heads % ranks:
        raise ValueError(
            f"TensorParallel: device_mesh: expected a size that divides the {heads} query heads, got {ranks}"
        )
    if kv_heads % ranks and ranks % kv_heads:
        raise ValueError(
            f"TensorParallel: device_mesh: expected a size that divides the {kv_heads} key heads, or is a multiple of "
            f"them, got {ranks}"
        )


def _check_unwrapped(layer: SelfAttention) -> None:
    """The shards are read past the modules that hold them."""
    norm = RMSNorm if layer.norm_unit_offset else nn.RMSNorm
    expected = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), nn.Linear)
    if layer.qk_norm:
        expected |= dict.fromkeys(("q_norm", "k_norm"), norm)
    for name, kind in expected.items():
        module = layer._modules[name]
        if not _is_unwrapped(module, kind):
            raise TypeError(
                f"TensorParallel: {name}: expected a plain {kind.__name__} with nothing wrapped around it, got "
                f"{type(module).__name__}; ColwiseParallel and RowwiseParallel of PyTorch call what is wrapped"
            )


class HeadsForward(NamedTuple):
    """The forward pass of a layer whose heads are spread over ``group``."""

    group: RankGroup
    mesh: DeviceMesh
    shards_sequence: bool
    kv_rows: tuple[int, int] | None

    def __call__(
        self,
        layer: SelfAttention,
        x: Tensor,
        freqs: tuple[Tensor, Tensor] | None,
        segment_ids: Tensor | None,
        context: Any,
    ) -> Tensor:
        """``SelfAttention.forward``, of shards of the sequence where it is sharded. With a context every rank has its
        layout."""
        _check_unwrapped(layer)
        self._check_input(layer, x, segment_ids)
        if not torch.compiler.is_compiling() and dist.get_debug_level() != dist.DebugLevel.OFF:
            self._check_agreement(layer, x, freqs, segment_ids)

        projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj)
        x, *weights = _autocast(x, *(_local(projection.weight) for projection in projections))
        _, *biases = _autocast(x, *(_local(projection.bias) for projection in projections))
        q_norm, k_norm = (None if norm is None else _local(norm.weight) for norm in (layer.q_norm, layer.k_norm))
        norms_are_split = layer.normalises_projections
        q, k, v, *summed = ProjectInput.apply(
            self.group,
            self.shards_sequence,
            self.kv_rows,
            x,
            *weights[:3],
            *biases[:3],
            None if norms_are_split else q_norm,
            None if norms_are_split and self.kv_rows is None else k_norm,
        )
        q_norm, k_norm = (own if sum_ is None else sum_ for own, sum_ in zip((q_norm, k_norm), summed, strict=True))

        if norms_are_split:
            q, k = self._normalise_projections(layer, q, k, q_norm, k_norm)
            norms = (None, None, layer.norm_eps)
        elif q_norm is not None:
            unit_offset = layer.norm_unit_offset
            norms = (norm_factor(q_norm, unit_offset), norm_factor(k_norm, unit_offset), layer.q_norm.eps)
        else:
            norms = (None, None, layer.norm_eps)
        if freqs is None and layer.makes_tables:
            freqs = layer._make_tables(q, None)
        sinks, tables = _local(layer.sinks), freqs or (None, None)
        if context is None:
            attended = layer._attend(q, k, v, norms, sinks, *tables, segment_ids, None)
        else:
            attended = layer._attend_in_context(q, k, v, norms, sinks, *tables, context)
        out = ProjectOutput.apply(self.group, self.shards_sequence, attended, weights[3], biases[3])
        return nn.functional.dropout(out, layer.dropout_rate, layer.training)

    def _normalise_projections(
        self, layer: SelfAttention, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """RMSNorm over the heads of every rank, of which each has some."""
        ranks_of_key_head = self.group.size * k.shape[2] // (layer.num_kv_heads * layer.head_dim)
        if self.kv_rows is not None:
            k_weight = k_weight.narrow(0, *self.kv_rows)
        wide = [x if x.dtype == torch.float64 else x.float() for x in (q, k)]
        squares = torch.stack([x.square().sum(-1, keepdim=True) for x in wide])
        q_squares, k_squares = SumOverRanks.apply(self.group, squares)
        q_mean = q_squares / (layer.num_heads * layer.head_dim)
        k_mean = k_squares / (layer.num_kv_heads * layer.head_dim * ranks_of_key_head)
        normalised = []
        for x, mean, weight, norm in zip(
            wide, (q_mean, k_mean), (q_weight, k_weight), (layer.q_norm, layer.k_norm), strict=True
        ):
            factor = norm_factor(weight, layer.norm_unit_offset)
            normalised.append((x * torch.rsqrt(mean + norm.eps) * factor).to(q.dtype))
        return normalised[0], normalised[1]

    def _check_input(self, layer: SelfAttention, x: Tensor, segment_ids: Tensor | None) -> None:
        if isinstance(x, DTensor):
            raise TypeError("TensorParallel: x: expected a plain tensor, got a DTensor; its to_local() is one")
        length = "S / n" if self.shards_sequence else "S"
        if x.dim() != 3 or x.shape[2] != layer.embedding_dim:
            raise ValueError(
                f"TensorParallel: x: expected (B, {length}, {layer.embedding_dim}), got shape {tuple(x.shape)}"
            )
        weight = layer.q_proj.weight
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"TensorParallel: x: expected the dtype of the weights, {weight.dtype}, got {x.dtype}")
        if self.shards_sequence and segment_ids is not None:
            ranks = self.group.size
            if segment_ids.dim() != 2 or segment_ids.shape[1] != x.shape[1] * ranks:
                raise ValueError(
                    f"TensorParallel: segment_ids: expected those of whole rows, (B, {x.shape[1] * ranks}), for x of "
                    f"(B, {x.shape[1]}, E) on each of {ranks} ranks, got shape {tuple(segment_ids.shape)}"
                )

    def _check_agreement(
        self, layer: SelfAttention, x: Tensor, freqs: tuple[Tensor, Tensor] | None, segment_ids: Tensor | None
    ) -> None:
        """Where TORCH_DISTRIBUTED_DEBUG is set: different shapes end a process in Gloo, and hang NCCL."""
        facts = {"x": (tuple(x.shape), x.dtype), "layer": (layer.training, layer.extra_repr())}
        facts["segment_ids"] = None if segment_ids is None else content_of(segment_ids)
        facts["freqs"] = None if freqs is None else [content_of(table) for table in freqs]
        if not self.shards_sequence:
            facts["content of x"] = content_of(x)
            if layer.training and layer.dropout_rate:
                generator = torch.get_device_module(x.device.type) if x.device.type != "cpu" else torch
                facts["random numbers of dropout"] = content_of(generator.get_rng_state())
        check_agreement(facts, self.mesh)


def _local(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.to_local()


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """All of them in the dtype of autocast, where it is on."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))
