"""What selective activation checkpointing should save."""

import torch


def attention_operators() -> list[torch._ops.OpOverload]:
    """The operators that compute attention, for selective activation checkpointing: where a policy saves what they
    return, the backward pass computes no attention again.

        save = functools.partial(create_selective_checkpoint_contexts, selfattn.attention_operators())
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=save)

    They are those of selfattn's kernels, and those of ATen that the backends ``cudnn`` and ``aten`` call. The backend
    ``reference``, and ``aten`` where PyTorch has no fused kernel for a call, are matrix products and small operators,
    which a policy sees one by one.

    Returns:
        A new list of operator overloads, for ``torch.utils.checkpoint.create_selective_checkpoint_contexts`` or a
        policy's own collection.
    """
    aten = torch.ops.aten
    return [
        torch.ops.selfattn.flash_attention.default,
        torch.ops.selfattn.qk_norm_rope_attention.default,
        torch.ops.selfattn.context_parallel_attention_forward.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
