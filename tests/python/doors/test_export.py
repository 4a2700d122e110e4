"""torch.export gives a program for any batch and length, and AOTInductor a package that runs it."""

from pathlib import Path

import pytest
import torch
from support.problems import make_ids, make_positions
from torch.export import Dim

import selfattn
from selfattn import SelfAttention, SelfAttentionConfig

CONFIG = SelfAttentionConfig(head_dim=16, qk_norm=True, num_kv_heads=2, window_left=6)


def example(batch: int, length: int) -> tuple[torch.Tensor, None, torch.Tensor]:
    return torch.randn(batch, length, 64), None, make_ids("shuffled", batch, length)


def export(module: SelfAttention, dynamic: bool) -> torch.export.ExportedProgram:
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=2, max=4096)
    shapes = ({0: batch, 1: length}, None, {0: batch, 1: length}) if dynamic else None
    return torch.export.export(module.eval(), example(2, 10), dynamic_shapes=shapes)


def test_exported_program_serves_other_shapes() -> None:
    module = SelfAttention(64, CONFIG)
    program = export(module, dynamic=True).module()
    for batch, length in ((2, 10), (3, 17), (5, 33)):
        inputs = example(batch, length)
        torch.testing.assert_close(program(*inputs), module(*inputs))


def test_exported_program_survives_a_file(tmp_path: Path) -> None:
    module = SelfAttention(64, CONFIG)
    torch.export.save(export(module, dynamic=True), tmp_path / "module.pt2")
    inputs = example(3, 17)
    loaded = torch.export.load(tmp_path / "module.pt2").module()
    torch.testing.assert_close(loaded(*inputs), module(*inputs))


def test_exported_graph_can_be_trained() -> None:
    module = SelfAttention(64, CONFIG)
    program = torch.export.export(module, example(2, 10)).module()
    inputs = example(2, 10)
    program(*inputs).square().sum().backward()
    module(*inputs).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in program.named_parameters()}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


class Chunk(torch.nn.Module):
    """A chunk of queries against longer keys."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return selfattn.multihead_attention(q, k, k, positions=positions, kv_positions=keys, window_left=6)


def chunk(batch: int, length: int) -> tuple[torch.Tensor, ...]:
    positions, kv_positions = make_positions("cache", batch, length, length + 9)
    return torch.randn(batch, length, 4, 16), torch.randn(batch, length + 9, 2, 16), positions, kv_positions.long()


def export_chunk() -> torch.export.ExportedProgram:
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=2, max=4096)
    of_queries, of_keys = {0: batch, 1: length}, {0: batch, 1: length + 9}
    return torch.export.export(Chunk(), chunk(2, 10), dynamic_shapes=(of_queries, of_keys, of_queries, of_keys))


def test_exported_positions_serve_other_shapes() -> None:
    program = export_chunk().module()
    for shape in ((2, 10), (3, 17), (5, 33)):
        inputs = chunk(*shape)
        torch.testing.assert_close(program(*inputs), Chunk()(*inputs))


def test_aotinductor_package_takes_positions(tmp_path: Path) -> None:
    with torch.no_grad():
        path = str(tmp_path / "chunk.pt2")
        runner = torch._inductor.aoti_load_package(
            torch._inductor.aoti_compile_and_package(export_chunk(), package_path=path)
        )
        for shape in ((2, 10), (3, 17)):
            inputs = chunk(*shape)
            torch.testing.assert_close(runner(*inputs), Chunk()(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [True, False])
def test_aotinductor_package_equals_the_module(dynamic: bool, tmp_path: Path) -> None:
    module = SelfAttention(64, CONFIG)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            export(module, dynamic), package_path=str(tmp_path / "module.pt2")
        )
        runner = torch._inductor.aoti_load_package(package)
        for batch, length in ((2, 10), (3, 17)) if dynamic else ((2, 10),):
            x, _, ids = example(batch, length)
            torch.testing.assert_close(runner(x, None, ids), module(x, None, ids), rtol=1e-4, atol=1e-5)
