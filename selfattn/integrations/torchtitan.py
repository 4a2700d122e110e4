"""selfattn as the attention of torchtitan's models, by two options of a training job:

    --experimental.custom_import=selfattn.integrations.torchtitan --model.converters=selfattn

for a flavour whose ``attn_type`` is "varlen". Importing this module makes the model converter "selfattn" known to
torchtitan. docs/integrations.md says what arrives here, and what cannot be served.
"""

import sys

import torch
from torch import Tensor, nn
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.attention import VarlenAttentionWrapper, VarlenMetadata
from torchtitan.protocols.model_converter import register_model_converter

from selfattn.checkpointing import attention_operators
from selfattn.functional import multihead_attention, segment_ids_from_positions

__all__ = ["Converter", "DocumentAttention", "DocumentIds", "get_attention_masks"]


class DocumentIds(VarlenMetadata):
    """Which tokens attend to each other, as ids: what the models hand to ``DocumentAttention`` for a mask.

    torchtitan's models let nothing but a ``VarlenMetadata`` through. Its fields of lengths hold ids here, with the
    batch as their first dimension, so that a pipeline schedule splits them as it splits the tokens.
    """

    __slots__ = ()

    @classmethod
    def of(cls, segment_ids: Tensor) -> "DocumentIds":
        """
        Args:
            segment_ids: (B, S) int32 or int64; equal ids attend to each other, negative is padding.
        """
        return cls(segment_ids, segment_ids, segment_ids.shape[1], segment_ids.shape[1])

    @property
    def segment_ids(self) -> Tensor:
        return self.cu_seq_q


class DocumentAttention(nn.Module):
    """The inner attention of a layer, in the place of ``VarlenAttentionWrapper``."""

    def forward(
        self, xq: Tensor, xk: Tensor, xv: Tensor, attention_masks: DocumentIds, scale: float | None = None
    ) -> Tensor:
        """Exact causal attention inside documents, on this rank's heads.

        Args:
            xq: (B, NH, S, D).
            xk: (B, NKV, S, D); NH is a multiple of NKV.
            xv: (B, NKV, S, DV).
            attention_masks: the ids of the tokens.
            scale: factor of the logits; None is 1 / sqrt(D).

        Returns:
            (B, S, NH, DV), contiguous.

        Raises:
            TypeError: ``attention_masks`` is no ``DocumentIds``.
        """
        if not isinstance(attention_masks, DocumentIds):
            raise TypeError(
                "selfattn: attention_masks must be DocumentIds, of the model's get_attention_masks; got "
                f"{type(attention_masks).__name__}"
            )
        q, k, v = (x.transpose(1, 2) for x in (xq, xk, xv))
        return multihead_attention(q, k, v, attention_masks.segment_ids, qk_scale=scale).contiguous()


class Converter:
    """The model converter "selfattn": every attention of a model becomes a ``DocumentAttention``, the model makes ids
    instead of lengths, and selective activation checkpointing keeps what attention returns.

    Raises:
        NotImplementedError: the job asks for context parallelism.
    """

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        degree = job_config.parallelism.context_parallel_degree
        if degree > 1:
            raise NotImplementedError(
                f"selfattn: context_parallel_degree must be 1; got {degree}. torchtitan has no context parallelism for "
                'attn_type="varlen", which hands documents over'
            )

    def convert(self, model: nn.Module) -> None:
        """
        Args:
            model: a model of torchtitan, changed in place.

        Raises:
            ValueError: the model's flavour is not one of ``attn_type`` "varlen", or does not keep documents apart.
        """
        arguments = model.model_args
        attention, mask = getattr(arguments, "attn_type", None), getattr(arguments, "attn_mask_type", None)
        if attention != "varlen" or mask != "block_causal":
            raise ValueError(
                'selfattn: the flavour must have attn_type="varlen" and attn_mask_type="block_causal", as '
                f'llama3\'s "8B_varlen" does; got attn_type={attention!r} and attn_mask_type={mask!r}'
            )
        places = [
            (parent, name)
            for parent in model.modules()
            for name, child in parent.named_children()
            if isinstance(child, VarlenAttentionWrapper)
        ]
        if not places:
            raise ValueError(
                f"selfattn: {type(model).__name__} must have layers with a VarlenAttentionWrapper; got none"
            )
        for parent, name in places:
            setattr(parent, name, DocumentAttention())
        model.get_attention_masks = get_attention_masks
        _extend_save_lists()

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing is left to do after a step."""


def get_attention_masks(
    input_batch: Tensor, tokenizer: BaseTokenizer, extra_inputs: dict[str, Tensor] | None = None
) -> DocumentIds:
    """The ids of a batch, in the place of a model's own ``get_attention_masks``.

    Args:
        input_batch: (B, S) tokens.
        tokenizer: whose ``eos_id`` ends a document, as each row's end does.
        extra_inputs: what else the dataloader gave. ``positions`` (B, S), which the model's rotation follows, say where
            documents start: at each that is not its left neighbour's + 1. Without them the tokens do.

    Raises:
        ValueError: neither positions nor an ``eos_id``.
    """
    positions = (extra_inputs or {}).get("positions")
    if positions is not None:
        return DocumentIds.of(segment_ids_from_positions(positions))
    if tokenizer.eos_id is None:
        raise ValueError("selfattn: the tokenizer must have an eos_id, or the dataloader give positions; got neither")
    ends = (input_batch == tokenizer.eos_id).to(torch.int32)
    return DocumentIds.of(ends.cumsum(1, dtype=torch.int32) - ends)


def _extend_save_lists() -> None:
    """Adds selfattn's operators to what torchtitan's models save in the mode "op" of selective activation
    checkpointing."""
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan.") and hasattr(module, "_op_sac_save_list"):
            module._op_sac_save_list.update(attention_operators())


register_model_converter(Converter, "selfattn")
