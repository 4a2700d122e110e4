"""Promise: ``ParallelConfig.device_mesh`` makes the mesh of its axes for any number of ranks, and refuses sizes that do
not make it."""

import pytest
from support.ranks import Ranks, in_fake_job
from support.small_model import make_model

from selfattn import ParallelConfig
from selfattn.distributed import parallelize
from selfattn.distributed._collectives import RankGroup


def check_thousand_ranks() -> None:
    config = ParallelConfig(pipeline_axis_size=2, fsdp_axis_size=16, context_axis_size=4, model_axis_size=2)
    mesh = config.device_mesh("cpu")
    assert mesh.mesh_dim_names == ("pp", "dp", "fsdp", "cp", "tp")
    assert mesh.shape == (2, 4, 16, 4, 2)
    assert mesh["tp"].get_local_rank() == 1
    assert RankGroup.of_mesh(mesh["fsdp"], True)[1:] == (16, 15, True)


def test_a_thousand_ranks() -> None:
    in_fake_job(1024, check_thousand_ranks)


def check_model_of_many_ranks() -> None:
    config = ParallelConfig(fsdp_axis_size=64, model_axis_size=4, fsdp_modules=["Block"], fsdp_min_weight_size=0)
    model = parallelize(make_model(config), config.device_mesh("cpu"), config)
    weight = model.blocks[0].attn.q_proj.weight
    assert weight.shape == (32, 32)
    assert weight.device_mesh.mesh_dim_names == ("dp", "fsdp", "tp")


def test_model_over_many_ranks() -> None:
    in_fake_job(512, check_model_of_many_ranks)


def check_axes() -> None:
    names = {"data_axis_name": "replicas", "fsdp_axis_name": "shards", "model_axis_name": "heads"}
    mesh = ParallelConfig(model_axis_size=2, **names).device_mesh("cpu")
    assert mesh.mesh_dim_names == ("pp", "replicas", "shards", "cp", "heads")
    assert mesh.shape == (1, 2, 1, 1, 2)
    assert ParallelConfig(data_axis_size=1, fsdp_axis_size=-1).device_mesh("cpu").shape == (1, 1, 4, 1, 1)
    context = {"data_axis_size": 1, "context_axis_size": -1, "context_axis_name": "c"}
    mesh = ParallelConfig(**context, context_heads_size=2).device_mesh("cpu")
    assert mesh.mesh_dim_names == ("pp", "dp", "fsdp", "c_keys", "c_heads", "tp")
    assert mesh.shape == (1, 1, 1, 2, 2, 1)
    assert mesh["c_heads"].mesh.tolist() in ([0, 1], [2, 3])
    with pytest.raises(ValueError, match="a context axis whose ranks context_heads_size 3 divides, got 4"):
        ParallelConfig(**context, context_heads_size=3).device_mesh("cpu")
    other = ParallelConfig(**context, context_heads_size=4)
    with pytest.raises(ValueError, match=r"mesh: expected config\.context_heads_size, 4, ranks, got 2"):
        parallelize(make_model(), mesh, other)
    for fields in ({"model_axis_size": 3}, {"data_axis_size": 2}, {"fsdp_axis_size": 8}):
        (name,), (size,) = fields, fields.values()
        with pytest.raises(ValueError, match=f"expected axes whose sizes make 4 ranks, got .*{name} {size}"):
            ParallelConfig(**fields).device_mesh("cpu")


def test_axes_and_sizes(ranks: Ranks) -> None:
    ranks.run(check_axes, 4)


def test_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError, match="expected a process group, or WORLD_SIZE in the environment"):
        ParallelConfig().device_mesh("cpu")


def test_sizes_are_held_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match=r"expected axes whose sizes make 6 ranks, got .*fsdp_axis_size 4"):
        ParallelConfig(fsdp_axis_size=4).device_mesh("cpu")
