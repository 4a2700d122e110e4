"""Collectives of one axis of a mesh, as PyTorch's functional operators: eager mode runs them, compilers trace them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_collectives = torch.ops._c10d_functional


class RankGroup(NamedTuple):
    """The ranks of one axis of a mesh, and how they communicate.

    What ``start_...`` gives may be read after ``finish`` alone: until then the collective runs beside what is computed.
    Where nothing is to be overlapped, a start waits for its end.
    """

    name: str
    size: int
    rank: int
    """Of this process in the group."""
    overlaps: bool

    @classmethod
    def of_mesh(cls, mesh: DeviceMesh, overlaps: bool) -> "RankGroup":
        """Of a mesh of one dimension."""
        return cls(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank(), overlaps)

    def _started(self, result: Tensor) -> Tensor:
        return result if self.overlaps else _collectives.wait_tensor(result)

    def finish(self, started: Tensor) -> Tensor:
        return _collectives.wait_tensor(started) if self.overlaps else started

    def start_sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of a contiguous tensor, over its memory where nothing is traced."""
        operator = _collectives.all_reduce if torch.compiler.is_compiling() else _collectives.all_reduce_
        return self._started(operator(x, "sum", self.name))

    def start_sums(self, tensors: list[Tensor]) -> list[Tensor]:
        """Of several contiguous tensors of one dtype as one collective."""
        traced = torch.compiler.is_compiling()
        operator = _collectives.all_reduce_coalesced if traced else _collectives.all_reduce_coalesced_
        return [self._started(total) for total in operator(tensors, "sum", self.name)]

    def start_gather(self, x: Tensor) -> Tensor:
        """(B, S / n, F) of each rank -> (n B, S / n, F), which ``join_shards`` makes (B, S, F)."""
        return self._started(_collectives.all_gather_into_tensor(x.contiguous(), self.size, self.name))

    def join_shards(self, gathered: Tensor) -> Tensor:
        shards = gathered.unflatten(0, (self.size, -1))
        return shards.transpose(0, 1).flatten(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """(B, S / n, F) of each rank -> (B, S, F)."""
        return self.join_shards(self.finish(self.start_gather(x)))

    def start_scatter(self, x: Tensor) -> Tensor:
        """The sum over ranks of (B, S, F), of which each gets its (B, S / n, F)."""
        shards = x.unflatten(1, (self.size, -1)).transpose(0, 1).flatten(0, 1).contiguous()
        return self._started(_collectives.reduce_scatter_tensor(shards, "sum", self.size, self.name))
