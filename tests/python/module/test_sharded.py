"""Promise: FSDP2 on each projection, and on the whole layer, trains as the layer alone does."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from support.problems import error, make_ids
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from selfattn import SelfAttention, SelfAttentionConfig


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Of one process: everything but the communication."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj", "out_proj"), ("v_proj",), ()], ids=str)
def test_fully_shard(mesh: DeviceMesh, names: tuple[str, ...]) -> None:
    layer = SelfAttention(32, SelfAttentionConfig(head_dim=8, qk_norm=True, sinks=True), dtype=torch.float64)
    sharded = copy.deepcopy(layer)
    for name in names:
        fully_shard(getattr(sharded, name), mesh=mesh)
    if not names:
        fully_shard(sharded, mesh=mesh)
    x, ids = torch.randn(2, 9, 32, dtype=torch.float64), make_ids("packed", 2, 9)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (layer, sharded)]
    for _ in range(3):
        outs = []
        for module, optimizer in zip((layer, sharded), optimizers, strict=True):
            out = module(x, segment_ids=ids)
            optimizer.zero_grad()
            out.square().sum().backward()
            optimizer.step()
            outs.append(out)
        assert error(outs[1], outs[0]) < 1e-12
    for own, other in zip(layer.parameters(), sharded.parameters(), strict=True):
        assert error(other.full_tensor() if hasattr(other, "full_tensor") else other, own) < 1e-12
