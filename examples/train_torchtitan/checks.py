"""What the model computes of packed rows, against the documents alone and against torchtitan's own document mask."""

import dataclasses

import torch
from documents import EOS, Tokenizer
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention
from torchtitan.models.attention import FlexAttentionWrapper, get_causal_mask_mod, get_document_mask_mod
from torchtitan.models.llama3 import Transformer

from selfattn.integrations.torchtitan import DocumentIds


@torch.no_grad()
def difference_from_documents(model: Transformer, tokens: Tensor) -> float:
    """The largest relative difference between the logits of packed rows and of their documents, one by one."""
    packed = model(tokens, attention_masks=model.get_attention_masks(tokens, Tokenizer))
    alone = torch.empty_like(packed)
    for row, of_row in zip(tokens, alone, strict=True):
        ends = (torch.nonzero(row == EOS).flatten() + 1).tolist()
        for start, end in zip([0, *ends], [*ends, len(row)], strict=True):
            if start < end:
                one = row[None, start:end]
                of_row[start:end] = model(one, attention_masks=DocumentIds.of(torch.zeros_like(one)))[0]
    return _relative(packed, alone)


@torch.no_grad()
def difference_from_flex_attention(model: Transformer, tokens: Tensor) -> float:
    """The same against a "flex" flavour with the same weights. It is not compiled: that asks for a GPU."""
    arguments = dataclasses.replace(model.model_args, attn_type="flex")
    theirs = Transformer(arguments).to(tokens.device)
    theirs.load_state_dict(model.state_dict())
    FlexAttentionWrapper._compiled_flex_attn = flex_attention
    rule = and_masks(get_causal_mask_mod(), get_document_mask_mod(tokens, EOS))
    mask = create_block_mask(rule, len(tokens), None, tokens.shape[1], tokens.shape[1], device=tokens.device)
    ours = model(tokens, attention_masks=model.get_attention_masks(tokens, Tokenizer))
    return _relative(ours, theirs(tokens, attention_masks=mask))


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
