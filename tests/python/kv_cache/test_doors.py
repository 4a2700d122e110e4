"""Promise: compiled, exported and packaged programs write to caches, inputs or buffers of theirs, and read them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support.kv_cache import CacheCase
from support.problems import error
from torch import Tensor, nn

import selfattn
from selfattn import KVCache, PageAllocator, SelfAttention, SelfAttentionConfig

E, ROWS, CAPACITY = 32, 2, 16
CONFIG = SelfAttentionConfig(head_dim=8, num_kv_heads=2, qk_norm=True, window_left=6, sinks=True)


class WithInputs(nn.Module):
    """A step over caches that are inputs."""

    def __init__(self, config: SelfAttentionConfig = CONFIG) -> None:
        super().__init__()
        self.layer = SelfAttention(E, config)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, page_table: Tensor) -> Tensor:
        return self.layer(x, cache=(keys, values, lengths, page_table))


class WithBuffers(nn.Module):
    """A step over caches that the program holds, lengths among them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = SelfAttention(E, CONFIG)
        keys, values, lengths, _ = KVCache.dense(1, ROWS, CAPACITY, 2, 8).layer(0)
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)
        self.register_buffer("lengths", lengths)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x, cache=(self.keys, self.values, self.lengths, None))
        self.lengths.add_(x.shape[1])
        return out


def paged() -> KVCache:
    cache = KVCache.paged(1, 8, 4, max_sequences=ROWS, max_length=CAPACITY, num_kv_heads=2, head_dim=8)
    allocator = PageAllocator(cache)
    for row in range(ROWS):
        allocator.reserve(row, CAPACITY)
    return cache


def check_steps(run, layer: SelfAttention, takes_cache: bool, sizes: tuple[int, ...] = (1,) * 6) -> None:
    x, cache = torch.randn(ROWS, sum(sizes), E), paged()
    with torch.no_grad():
        outs = []
        for piece in x.split(sizes, 1):
            piece = piece.contiguous()  # a package takes the strides that it was made for
            outs.append(run(piece, *cache.layer(0)) if takes_cache else run(piece))
            cache.advance(piece.shape[1])
        assert error(torch.cat(outs, 1), layer(x)) < 1e-5


@pytest.mark.parametrize("kind", (WithInputs, WithBuffers))
@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiled_steps(backend: str, kind: type[nn.Module]) -> None:
    torch.compiler.reset()
    module = kind().eval()
    check_steps(torch.compile(module, backend=backend, fullgraph=True), module.layer, kind is WithInputs)


def export(module: nn.Module, length: int = 1) -> torch.export.ExportedProgram:
    inputs = (torch.randn(ROWS, length, E), *(paged().layer(0) if isinstance(module, WithInputs) else ()))
    with torch.no_grad():
        return torch.export.export(module, inputs)


@pytest.mark.parametrize("kind", (WithInputs, WithBuffers))
def test_exported_steps(kind: type[nn.Module], tmp_path: Path) -> None:
    module = kind().eval()
    torch.export.save(export(module).run_decompositions(), tmp_path / "step.pt2")
    program = torch.export.load(tmp_path / "step.pt2").module()
    check_steps(program, module.layer, kind is WithInputs)


@torch.no_grad()
def test_exported_chunks_of_any_length() -> None:
    module = WithInputs(dataclasses.replace(CONFIG, sinks=False)).eval()
    inputs = (torch.randn(ROWS, 3, E), *paged().layer(0))
    shapes = ({1: torch.export.Dim("length", min=2, max=CAPACITY)}, None, None, None, None)
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    check_steps(program.module(), module.layer, takes_cache=True, sizes=(5, 2, 7))


def test_a_layer_as_an_input_of_an_export() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SelfAttention(E, CONFIG)

        def forward(self, x: Tensor, cache: selfattn.KVCacheLayer) -> Tensor:
            return self.layer(x, cache=cache)

    module = Step().eval()
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(ROWS, 1, E), paged().layer(0))).module()
    check_steps(lambda x, *cache: program(x, selfattn.KVCacheLayer(*cache)), module.layer, takes_cache=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", (WithInputs, WithBuffers))
def test_packaged_steps(kind: type[nn.Module], tmp_path: Path) -> None:
    module = kind().eval()
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(export(module), package_path=str(tmp_path / "step.pt2"))
        check_steps(torch._inductor.aoti_load_package(package), module.layer, kind is WithInputs)


CASES = {
    "paged": CacheCase(num_queries=2),
    "dense": CacheCase(table=None),
    "ragged": CacheCase(num_queries=6, ids="padded"),
    "tree": CacheCase(num_queries=4, has_draft_mask=True),
}


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_compiled_attention(case: CacheCase, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(selfattn.attention_with_kv_cache, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for seed in range(2):  # the same graph with other lengths, tables and ids
        call = case.with_(seed=seed).make()
        torch.testing.assert_close(compiled(**call), selfattn.attention_with_kv_cache(**call))
