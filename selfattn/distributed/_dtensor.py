"""What lies between the projections of a layer whose projections are sharded by PyTorch's own plans, as DTensors."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


def heads_as_dtensors(
    projections: tuple[nn.Module, ...], projected: tuple[Tensor, ...], head_dim: int
) -> tuple[DTensor, ...]:
    """What the query, key and value projections gave, (B, S, heads * head_dim) each.

    ColwiseParallel gives plain tensors: of fewer features than its weight has rows where they are a rank's share. Heads
    that the mesh does not divide are gathered.
    """
    weights = [getattr(projection, "weight", None) for projection in projections]
    mesh = next(tensor for tensor in (*projected, *weights) if isinstance(tensor, DTensor)).device_mesh
    heads = []
    for own, weight in zip(projected, weights, strict=True):
        if not isinstance(own, DTensor):
            is_share = isinstance(weight, DTensor) and own.shape[-1] != weight.shape[0]
            own = DTensor.from_local(own, mesh, [Shard(2) if is_share else Replicate()])
        if own.placements[0].is_shard(2) and own.shape[-1] % (head_dim * mesh.size()):
            own = own.redistribute(placements=[Replicate()])
        heads.append(own)
    return tuple(heads)


def replicated(tensor: Tensor | None, mesh: DeviceMesh) -> Tensor | None:
    """A tensor that every rank has whole; its gradient is the sum of every rank's."""
    if tensor is None or isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim)


def sinks_of(sinks: Tensor | None, q: DTensor) -> Tensor | None:
    """(NH,), sharded where the heads of q are: DTensor redistributes no keyword arguments of operators."""
    if sinks is None:
        return None
    placements = [Shard(0) if placement.is_shard(2) else Replicate() for placement in q.placements]
    return replicated(sinks, q.device_mesh).redistribute(placements=placements)
