"""A tiny language model of the demo, untrained, and the text that it finds likeliest."""

import torch
from model import LanguageModel
from packing import BOUNDARY

from selfattn import SelfAttentionConfig


def make_language_model() -> LanguageModel:
    """Its texts end, some soon and some late: the boundary is likelier than any other token."""
    model = LanguageModel(32, 64, 2, SelfAttentionConfig(head_dim=16, num_kv_heads=1, num_layers=2)).eval()
    torch.nn.init.normal_(model.head.weight, std=32**-0.5)  # of a new model it is 0
    with torch.no_grad():
        model.head.weight[BOUNDARY] *= 1.8
    return model


@torch.no_grad()
def likeliest_tokens(model: LanguageModel, prompt: bytes, max_bytes: int) -> list[int]:
    """With the boundary, where it ended the text."""
    tokens = [BOUNDARY, *prompt]
    while len(tokens) <= len(prompt) + max_bytes:
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] == BOUNDARY:
            break
    return tokens[len(prompt) + 1 :]
