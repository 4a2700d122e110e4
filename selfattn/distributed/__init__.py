"""Models over several devices, on PyTorch's engines: DeviceMesh, DTensor, FSDP2, DDP and functional collectives."""

import torch

if not torch.distributed.is_available():
    raise ImportError("selfattn.distributed: expected a PyTorch with torch.distributed, got one that is built without")

from selfattn.distributed._tensor_parallel import TensorParallel

__all__ = ["TensorParallel"]
