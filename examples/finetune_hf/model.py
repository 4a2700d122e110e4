"""A small Llama of transformers, built on the spot, with PEFT's adapters on all its projections."""

import torch
from documents import VOCABULARY
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import selfattn.integrations.transformers


def build_model(
    width: int, layers: int, longest: int, rank: int, device: str, dtype: torch.dtype, head_dim: int = 32
) -> PeftModel:
    selfattn.integrations.transformers.register()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // head_dim,
        num_key_value_heads=max(1, width // head_dim // 2),
        max_position_embeddings=longest,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        # Training fills no cache. (With one, sdpa and eager attend across packed documents; selfattn does not.)
        use_cache=False,
        attn_implementation="selfattn",
    )
    model = LlamaForCausalLM(config).to(device, dtype)
    # The adapters of a pretrained model would do; a random one learns to speak through its last layer too.
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", modules_to_save=["lm_head"])
    return get_peft_model(model, adapters)
