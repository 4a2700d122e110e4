"""RMSNorm with weights that may be stored as their distance from 1."""

import torch
from torch import Tensor, nn


def norm_factor(weight: Tensor, unit_offset: bool) -> Tensor:
    """What normalised numbers are multiplied by: ``weight``, or 1 + ``weight`` in at least float32."""
    if not unit_offset:
        return weight
    return 1.0 + (weight if weight.dtype == torch.float64 else weight.float())


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv:1910.07467, eq. 4) over the last dimensions, with weights w, or 1 + w.

    Args:
        normalized_shape: of the dimensions that are normalised together.
        eps: added to the mean of the squares.
        unit_offset: multiply by 1 + w instead of w, as Gemma does; the initial w is then 0. Computed in at least
            float32, since 1 + w keeps few digits of w in bfloat16.
        device: of the weights.
        dtype: of the weights.

    Parameters: ``weight`` (``normalized_shape``).
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-6,
        *,
        unit_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.unit_offset = unit_offset
        super().__init__(normalized_shape, eps=eps, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    def factor(self) -> Tensor:
        """What the normalised numbers are multiplied by: the weights, or 1 + w in at least float32."""
        return norm_factor(self.weight, self.unit_offset)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., *normalized_shape)`` -> the same, of x's dtype."""
        if not self.unit_offset:
            return nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        wide = x if x.dtype == torch.float64 else x.float()
        return nn.functional.rms_norm(wide, self.normalized_shape, self.factor().to(wide.dtype), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", unit_offset=True" if self.unit_offset else "")
