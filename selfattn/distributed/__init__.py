"""Models over several devices, on PyTorch's engines: DeviceMesh, DTensor, FSDP2, DDP and functional collectives.

docs/distributed.md is the guide. Importing this module registers how DTensor may shard the operators of selfattn.
"""

import torch

if not torch.distributed.is_available():
    raise ImportError("selfattn.distributed: expected a PyTorch with torch.distributed, got one that is built without")

from selfattn.distributed import _sharding_rules
from selfattn.distributed._context import ContextLayout, context_parallel_attention
from selfattn.distributed._parallelize import parallelize
from selfattn.distributed._parameters import clip_grad_norm_, parameter_groups
from selfattn.distributed._tensor_parallel import TensorParallel

_sharding_rules.register()

__all__ = [
    "ContextLayout",
    "TensorParallel",
    "clip_grad_norm_",
    "context_parallel_attention",
    "parallelize",
    "parameter_groups",
]
