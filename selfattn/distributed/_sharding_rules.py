"""How DTensor may shard the opaque operators: by heads or by batches. The composite ones are made of these and ATen's.

PyTorch calls ``register_sharding`` experimental; nothing else of the package uses it.
"""

from collections.abc import Callable

import torch
from torch._ops import OpOverload
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

_OPERATORS = (
    "flash_attention",
    "flash_attention_backward",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "qk_norm_rope_attention",
    "qk_norm_rope_attention_backward",
)
_HEADS = ("q", "k", "v", "out", "dq", "dk", "dv", "grad_out", "grad_q", "grad_k")
"""(B, S, heads, D)."""
_LSE = ("lse", "grad_lse")
"""(B, heads, S)."""
_TOKENS = ("segment_ids", "kv_segment_ids", "positions", "kv_positions", "freqs_sin", "freqs_cos")
"""(B, S, ...), or (1, S, ...)."""
_WEIGHT_GRADIENTS = ("dq_weight", "dk_weight")


def _by_heads(name: str, tensor: object) -> Placement:
    if name in _HEADS:
        return Shard(2)
    if name in _LSE:
        return Shard(1)
    if name == "sinks":
        return Shard(0)
    return Partial() if name in _WEIGHT_GRADIENTS else Replicate()


def _by_batches(name: str, tensor: object) -> Placement:
    if name in _HEADS or name in _LSE or (name in _TOKENS and tensor.shape[0] > 1):
        return Shard(0)
    return Partial() if name in _WEIGHT_GRADIENTS else Replicate()


def _replicated(name: str, tensor: object) -> Placement:
    return Replicate()


def _refuse_shards_of_sequence(operator: OpOverload, tensors: dict[str, object]) -> None:
    for name in ("q", "k", "v"):
        if name in tensors and any(placement.is_shard(1) for placement in tensors[name].placements):
            raise NotImplementedError(
                f"{operator.name()}: {name}: expected heads or batches sharded, Shard(2) or Shard(0), got the sequence "
                f"sharded, {tensors[name].placements}: that is context parallelism, which DTensor's rules do not do; "
                f"gather the sequence, as PrepareModuleInput(desired_input_layouts=(Replicate(),)) does"
            )


def _rule(operator: OpOverload) -> Callable[..., list[tuple[list[Placement], list[Placement]]]]:
    names = [argument.name for argument in operator._schema.arguments]
    results = [result.name for result in operator._schema.returns]

    def acceptable(*arguments: object, **keywords: object) -> list[tuple[list[Placement], list[Placement]]]:
        given = dict(zip(names, arguments, strict=False)) | keywords
        tensors = {name: value for name, value in given.items() if hasattr(value, "placements")}
        _refuse_shards_of_sequence(operator, tensors)
        heads = [tensor for name, tensor in tensors.items() if name in _HEADS]
        ranks = heads[0].mesh.size()
        kinds = [_replicated]
        if all(tensor.shape[2] % ranks == 0 for tensor in heads):
            kinds.append(_by_heads)
        if heads[0].shape[0] % ranks == 0:
            kinds.append(_by_batches)
        for name in keywords.keys() & tensors.keys():  # DTensor redistributes no keyword arguments
            held = tensors[name].placements
            kinds = [kind for kind in kinds if kind(name, tensors[name]) in held]
            if not kinds:
                raise ValueError(
                    f"{operator.name()}: {name}: expected the placement of one that is sharded as q is, or replicated "
                    f"beside a replicated q, got {held}"
                )
        return [
            ([kind(name, None) for name in results], [kind(name, tensor) for name, tensor in tensors.items()])
            for kind in kinds
        ]

    return acceptable


def _assertion(*arguments: object) -> list[tuple[list[Placement], list[Placement]]]:
    return [([], [Replicate()])]


def register() -> None:
    # Values of int64 ids and positions are checked on the device; PyTorch has no rule for that.
    register_sharding(torch.ops.aten._assert_async.msg)(_assertion)
    for name in _OPERATORS:
        operator = getattr(torch.ops.selfattn, name).default
        register_sharding(operator)(_rule(operator))
