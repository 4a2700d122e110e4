"""Whether ranks agree, asked before collectives that would hang or give garbage where they do not."""

import ctypes
import hashlib
import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def _fingerprint(fact: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(fact).encode()).digest()[:7], "big")


def check_agreement(facts: Mapping[str, object], *meshes: DeviceMesh) -> None:
    """Compares what each fact prints as over every rank of a mesh, or of a grid whose axes are ``meshes``, by one small
    collective an axis.

    Raises:
        ValueError: on every rank, naming the facts on which ranks differ, with this rank's.
    """
    prints = [_fingerprint(fact) for fact in facts.values()]
    extremes = torch.tensor([prints, [-number for number in prints]], device=meshes[0].device_type)
    for mesh in meshes:
        for axis, size in enumerate(mesh.shape):
            if size > 1:
                dist.all_reduce(extremes, dist.ReduceOp.MAX, group=mesh.get_group(axis))
    largest, smallest = extremes[0].tolist(), (-extremes[1]).tolist()
    differing = [name for name, high, low in zip(facts, largest, smallest, strict=True) if high != low]
    if differing:
        own = "; ".join(f"{name} {facts[name]}" for name in differing)
        ranks = math.prod(mesh.size() for mesh in meshes)
        raise ValueError(
            f"selfattn: expected the same {' and '.join(differing)} on the {ranks} ranks of the mesh, "
            f"got others on some; rank {dist.get_rank()} has {own}"
        )


def content_of(tensor: Tensor) -> tuple[object, ...]:
    """What tells a tensor from others, as a fact. Copies it to the host."""
    data = tensor.detach().cpu().contiguous()
    content = ctypes.string_at(data.data_ptr(), data.nbytes)
    return tuple(tensor.shape), tensor.dtype, hashlib.sha256(content).hexdigest()[:12]
