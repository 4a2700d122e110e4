"""SelfAttention's layer in plain PyTorch, vectorised, in whatever dtype its tensors have: what a user would write."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfattn import SelfAttention
from support.problems import allowed_pairs


def rotate(x: Tensor, positions: Tensor, theta: float, pairing: str) -> Tensor:
    """x (B, S, N, D); the angles in float64, their sines and cosines in the dtype of x."""
    dim = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=x.device) / dim)
    angles = (positions.to(x.device).double()[..., None] * frequencies)[:, :, None]
    sin, cos = angles.sin().to(x.dtype), angles.cos().to(x.dtype)
    if pairing == "half":
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)


def plain_forward(
    layer: SelfAttention,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    segment_ids: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """The output of ``layer`` without dropout, with ``parameters`` (by the names of its state dict) for its own."""
    batch, length, _ = x.shape

    def project(name: str, tensor: Tensor) -> Tensor:
        return F.linear(tensor, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))

    q, k, v = (project(name, x).view(batch, length, -1, layer.head_dim) for name in ("q_proj", "k_proj", "v_proj"))
    if layer.qk_norm:
        q = F.rms_norm(q, (layer.head_dim,), parameters["q_norm.weight"], layer.norm_eps)
        k = F.rms_norm(k, (layer.head_dim,), parameters["k_norm.weight"], layer.norm_eps)
    positions = torch.arange(length)[None] if positions is None else positions
    q, k = (rotate(heads, positions, layer.rope_theta, layer.rope_pairing) for heads in (q, k))
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(layer.head_dim)
    if layer.softcap > 0:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    windows = {"window_left": layer.window_left, "window_right": layer.window_right}
    allowed = allowed_pairs(x, x, segment_ids, layer.causal, **windows)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if layer.sinks is not None:
        sinks = parameters["sinks"].to(scores.dtype)[None, :, None, None].expand(batch, -1, length, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :length] * allowed  # a row without an allowed key gives 0
    return project("out_proj", (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


def plain_results(
    layer: SelfAttention, dtype: torch.dtype, x: Tensor, grad: Tensor, **inputs: Any
) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of every parameter, computed in ``dtype`` for the loss
    (out * grad).sum()."""
    parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in layer.named_parameters()}
    leaves = {"x": x.detach().to(dtype).requires_grad_(), **parameters}
    out = plain_forward(layer, parameters, leaves["x"], **inputs)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def module_results(layer: SelfAttention, x: Tensor, grad: Tensor, *arguments: Any) -> dict[str, Tensor]:
    """What ``plain_results`` names, computed by the module itself."""
    leaves = {"x": x.detach().requires_grad_(), **dict(layer.named_parameters())}
    out = layer(leaves["x"], *arguments)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}
