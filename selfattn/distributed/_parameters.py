"""Optimizers and gradient norms of models whose parameters lie on several meshes, or on none.

PyTorch's operators on lists of tensors, which foreach and fused optimizers and ``clip_grad_norm_`` are made of, take
DTensors of one mesh at a time.
"""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, list[nn.Parameter]]]:
    """Groups for an optimizer, each of parameters that lie on one mesh, or are plain tensors."""
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return [{"params": group} for group in groups.values()]


def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scales gradients down to ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does for one process.

    Args:
        parameters: of the model, on any meshes; without a gradient they do not count.
        max_norm: the largest norm.
        norm_type: p of the p-norm over all elements; inf is the largest magnitude.

    Returns:
        The norm before, () on every rank.
    """
    groups = [group["params"] for group in parameter_groups(p for p in parameters if p.grad is not None)]
    norms = [get_total_norm([parameter.grad for parameter in group], norm_type) for group in groups]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = get_total_norm(norms, norm_type)
    for group in groups:
        clip_grads_with_norm_(group, max_norm, total)
    return total
