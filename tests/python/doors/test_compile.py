"""torch.compile takes the operators and the module in one graph, for one shape and for any, forward and backward."""

import pytest
import torch
from support.problems import make_ids, make_positions

import selfattn
from selfattn import SelfAttention, SelfAttentionConfig

COMPILERS = ["aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_module_in_one_graph(compiler: str, dynamic: bool) -> None:
    config = SelfAttentionConfig(head_dim=16, qk_norm=True, num_kv_heads=2, use_bias=True, sinks=True)
    module = SelfAttention(64, config)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=compiler)
    for length in (9, 14) if dynamic else (9,):
        x = torch.randn(2, length, 64, requires_grad=True)
        ids = make_ids("shuffled", 2, length)
        freqs = selfattn.precompute_freqs(16, torch.randint(0, 50, (2, length)))
        leaves = [x, *module.parameters()]
        out, expected = compiled(x, freqs, ids), module(x, freqs, ids)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        grad = torch.randn_like(out)
        gradients = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)
        for actual, oracle in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, oracle, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference", "aten", "flash"])
def test_attention_in_one_graph(dynamic: bool, backend: str) -> None:
    def function(q: torch.Tensor, k: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return selfattn.multihead_attention(q * 2, k, k, ids, window_left=6, backend=backend).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (9, 14) if dynamic else (9,):
        q, k = (torch.randn(2, length, heads, 16, requires_grad=True) for heads in (4, 2))
        ids = make_ids("mixed_padding", 2, length)
        expected = function(q, k, ids)
        out = compiled(q, k, ids)
        torch.testing.assert_close(out, expected)
        for actual, oracle in zip(
            torch.autograd.grad(out.sum(), (q, k)), torch.autograd.grad(expected.sum(), (q, k)), strict=True
        ):
            torch.testing.assert_close(actual, oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference", "aten", "flash"])
def test_positions_in_one_graph(dynamic: bool, backend: str) -> None:
    def function(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, kv_positions: torch.Tensor) -> torch.Tensor:
        options = {"positions": positions, "kv_positions": kv_positions, "window_left": 6, "backend": backend}
        return selfattn.multihead_attention(q * 2, k, k, **options).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (9, 14) if dynamic else (9,):
        q = torch.randn(2, length, 4, 16, requires_grad=True)
        k = torch.randn(2, length + 5, 2, 16, requires_grad=True)
        positions, kv_positions = make_positions("gathered", 2, length, length + 5)
        inputs = (q, k, positions, kv_positions.long())
        out, expected = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(out, expected)
        for actual, oracle in zip(
            torch.autograd.grad(out.sum(), (q, k)), torch.autograd.grad(expected.sum(), (q, k)), strict=True
        ):
            torch.testing.assert_close(actual, oracle, rtol=1e-4, atol=1e-5)


def test_converters_and_rotary_in_one_graph() -> None:
    def function(positions: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        ids = selfattn.segment_ids_from_positions(positions)
        boundaries = selfattn.cu_seqlens_from_segment_ids(ids, 9)
        q, k = selfattn.qk_norm_rope(q, q, positions=positions)
        return selfattn.multihead_attention(q, k, q, ids).sum() + boundaries.sum() + selfattn.segment_mask(ids).sum()

    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1, 2]])
    q = torch.randn(1, 9, 2, 16)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(positions, q), function(positions, q))


def test_one_compilation_serves_every_length() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(selfattn.multihead_attention, fullgraph=True, dynamic=True, backend=counter)
    for length in (8, 11, 17, 30):
        q = torch.randn(2, length, 2, 16)
        compiled(q, q, q, make_ids("packed", 2, length))
    assert counter.frame_count == 1


def test_errors_reach_the_user_of_compiled_code() -> None:
    compiled = torch.compile(selfattn.multihead_attention, backend="aot_eager")
    q = torch.randn(2, 4, 2, 16)
    with pytest.raises(Exception, match="selfattn: segment_ids must be int32 or int64"):
        compiled(q, q, q, torch.zeros(2, 4))
