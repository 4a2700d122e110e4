"""The module's output and all its gradients are as near to float64 as its dtype allows: 1e-5 in float32, and in
bfloat16 at most twice as far as the same layer in plain PyTorch."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.plain_module import module_results, plain_results
from support.problems import error, norm_error
from torch import Tensor

from selfattn import SelfAttention, SelfAttentionConfig, precompute_freqs

HEADS, HEAD_DIM, BATCH, LENGTH = 4, 64, 2, 150
ROUNDING_BFLOAT16 = 4e-3
"""Relative error in the norm that one rounding explains, where plain PyTorch happens to be nearer."""


@dataclass(frozen=True)
class Layer:
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    has_ids: bool = True
    has_positions: bool = False

    def __str__(self) -> str:
        return self.name


EVERYTHING = {
    "qk_norm": True,
    "use_bias": True,
    "num_kv_heads": 2,
    "window_left": 40,
    "sinks": True,
    "rope_pairing": "half",
    "rope_theta": 500.0,
}
LAYERS = [
    Layer("dense", has_ids=False),
    Layer("documents"),
    Layer("documents_positions", has_positions=True),
    Layer("dense_norm", {"qk_norm": True}, has_ids=False),
    Layer("documents_norm", {"qk_norm": True}),
    Layer("half", {"rope_pairing": "half"}),
    Layer("half_norm_positions", {"rope_pairing": "half", "qk_norm": True}, has_positions=True),
    Layer("grouped_norm", {"num_kv_heads": 2, "qk_norm": True}),
    Layer("one_kv_head", {"num_kv_heads": 1}),
    Layer("bias", {"use_bias": True}),
    Layer("window", {"window_left": 20}),
    Layer("window_both", {"window_left": 20, "window_right": 9, "causal": False}),
    Layer("full", {"causal": False}),
    Layer("softcap", {"softcap": 1.0}),
    Layer("sinks", {"sinks": True}),
    Layer("everything", EVERYTHING, has_positions=True),
]


def make_layer(layer: Layer, device: str, dtype: torch.dtype) -> SelfAttention:
    """A module whose every parameter matters: biases, norms and sinks are no zeros and ones."""
    config = SelfAttentionConfig(head_dim=HEAD_DIM, **layer.options)
    module = SelfAttention(HEADS * HEAD_DIM, config, device=device, dtype=dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(torch.randn(parameter.shape) / module.embedding_dim**0.5)
            else:
                parameter.copy_(0.5 * torch.randn(parameter.shape) + ("norm" in name))
    return module


def make_inputs(layer: Layer, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, the gradient of the output, ids with padding at the end, and each token's position in its document."""
    shape = (BATCH, LENGTH, HEADS * HEAD_DIM)
    x, grad = (torch.randn(shape).to(device, dtype) for _ in range(2))
    starts = torch.rand(BATCH, LENGTH) < 1 / 40
    ids = starts.cumsum(1)
    ids[:, LENGTH - 11 :] = -1
    index = torch.arange(LENGTH).expand(BATCH, LENGTH)
    positions = index - torch.where(starts, index, 0).cummax(1).values
    return x, grad, ids.to(device) if layer.has_ids else None, positions if layer.has_positions else None


def results_and_exact(
    layer: Layer, device: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Of the module, of plain PyTorch in float64, and of plain PyTorch in ``dtype``."""
    module = make_layer(layer, device, dtype)
    x, grad, ids, positions = make_inputs(layer, device, dtype)
    freqs = None if positions is None else precompute_freqs(HEAD_DIM, positions.to(device), theta=module.rope_theta)
    inputs = {"segment_ids": ids, "positions": positions}
    actual = module_results(module, x, grad, freqs, ids)
    return actual, *(plain_results(module, kind, x, grad, **inputs) for kind in (torch.float64, dtype))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_float32_is_within_1e_5_of_float64(layer: Layer, device: str) -> None:
    actual, exact, _ = results_and_exact(layer, device, torch.float32)
    for name, expected in exact.items():
        assert actual[name].dtype == torch.float32
        assert error(actual[name], expected) < 1e-5, name


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_bfloat16_errs_at_most_twice_as_much_as_plain_pytorch(layer: Layer, device: str) -> None:
    actual, exact, plain = results_and_exact(layer, device, torch.bfloat16)
    for name, expected in exact.items():
        assert actual[name].dtype == torch.bfloat16
        allowed = 2 * max(norm_error(plain[name], expected), ROUNDING_BFLOAT16)
        assert norm_error(actual[name], expected) <= allowed, name


def test_autocast_errs_at_most_twice_as_much_as_plain_pytorch_in_bfloat16(device: str) -> None:
    layer = Layer("autocast", EVERYTHING, has_positions=True)
    module = make_layer(layer, device, torch.float32)
    x, grad, ids, positions = make_inputs(layer, device, torch.float32)
    freqs = precompute_freqs(HEAD_DIM, positions.to(device), theta=module.rope_theta)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = module_results(module, x, grad, freqs, ids)
    assert actual["out"].dtype == torch.bfloat16
    inputs = {"segment_ids": ids, "positions": positions}
    exact, plain = (plain_results(module, kind, x, grad, **inputs) for kind in (torch.float64, torch.bfloat16))
    for name, expected in exact.items():
        assert name == "out" or actual[name].dtype == torch.float32
        allowed = 2 * max(norm_error(plain[name], expected), ROUNDING_BFLOAT16)
        assert norm_error(actual[name], expected) <= allowed, name
