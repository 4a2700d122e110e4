"""Norm, rotation and attention as one operator give bitwise what they give one after the other, gradients too."""

import pytest
import torch
from support.problems import error, make_ids
from support.serving_table import skip_unless_flash_serves
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import selfattn

OPS = torch.ops.selfattn
OPTIONS = {
    "plain": {},
    "full": {"causal": False},
    "window": {"window_left": 5, "causal": False, "window_right": 3},
    "scale_half": {"qk_scale": 0.3, "pairing": "half", "theta": 100.0, "eps": 1e-3},
    "partial": {},
    "partial_half": {"pairing": "half"},
}


def make(device: str, dtype: torch.dtype = torch.bfloat16, dim: int = 32) -> dict[str, Tensor]:
    heads = {"q": 4, "k": 2, "v": 2}
    tensors = {name: torch.randn(2, 40, n, dim, device=device).to(dtype) for name, n in heads.items()}
    tensors |= {name: torch.rand(dim, device=device) + 0.5 for name in ("q_weight", "k_weight")}
    return {**tensors, "sinks": torch.randn(4, device=device)}


def by_parts(q, k, v, q_weight, k_weight, sinks=None, segment_ids=None, freqs=(None, None), **options):
    norm_rope = {name: options.pop(name) for name in ("eps", "theta", "pairing") if name in options}
    q, k = OPS.qk_norm_rope(q, k, q_weight, k_weight, *freqs, **norm_rope)
    return OPS.flash_attention(q, k, v, segment_ids, sinks=sinks, **options)


def as_one(q, k, v, q_weight, k_weight, sinks=None, segment_ids=None, freqs=(None, None), **options):
    return OPS.qk_norm_rope_attention(q, k, v, q_weight, k_weight, *freqs, segment_ids, sinks=sinks, **options)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_results_and_gradients_are_those_of_the_parts(options: str, has_sinks: bool, device: str) -> None:
    skip_unless_flash_serves(device, torch.bfloat16, 32)
    tensors = make(device)
    if not has_sinks:
        del tensors["sinks"]
    others = {"segment_ids": make_ids("shuffled", 2, 40).to(device), **OPTIONS[options]}
    rotary_dim = {"plain": 32, "partial": 20, "partial_half": 16}.get(options)
    if rotary_dim:
        others["freqs"] = tuple(1.1 * t.to(device) for t in selfattn.precompute_freqs(rotary_dim, max_length=40))
    results = []
    torch.use_deterministic_algorithms(True)
    for function in (as_one, by_parts):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out, lse = function(**leaves, **others)
        loss = (out.float() * out.detach().float()).sum() + lse.masked_fill(lse.isinf(), 0.0).sum()
        results.append([out, lse, *torch.autograd.grad(loss, list(leaves.values()))])
    for actual, wanted in zip(*results, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_second_derivatives_are_those_of_the_reference(rotary_dim: int) -> None:
    tensors = make("cpu", torch.float32, dim=8)
    ids = make_ids("shuffled", 2, 40)
    freqs = selfattn.precompute_freqs(rotary_dim, max_length=40)

    def by_reference(q, k, v, q_weight, k_weight, sinks):
        q, k = OPS.qk_norm_rope(q, k, q_weight, k_weight, *freqs)
        return OPS.multihead_attention_lse(q, k, v, ids, backend="reference", sinks=sinks)

    def seconds(function) -> list[Tensor]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out, _ = function(**leaves)
        first = torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values())))

    found = seconds(lambda **t: as_one(**t, segment_ids=ids, freqs=freqs))
    for actual, wanted in zip(found, seconds(by_reference), strict=True):
        assert error(actual, wanted) < 1e-4


MODULES = {"plain": {}, "sinks": {"sinks": True}, "half": {"rope_pairing": "half", "num_kv_heads": 1}}


@pytest.mark.parametrize("config", MODULES)
def test_module_trains_as_with_another_backend(config: str, device: str) -> None:
    skip_unless_flash_serves(device, torch.bfloat16, 32)
    config = selfattn.SelfAttentionConfig(head_dim=32, qk_norm=True, **MODULES[config])
    module = selfattn.SelfAttention(128, config, device=device)
    ids = make_ids("packed", 2, 40).to(device)
    x = torch.randn(2, 40, 128, device=device, requires_grad=True)

    def gradients(backend: str, checkpointed: bool = False) -> dict[str, Tensor]:
        module.zero_grad()
        x.grad = None
        module.attention_backend = backend
        with torch.autocast(device, torch.bfloat16):
            run = lambda x: module(x, segment_ids=ids)  # noqa: E731
            out = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
        out.float().square().sum().backward()
        return {"x": x.grad.clone()} | {name: p.grad.clone() for name, p in module.named_parameters()}

    wanted, found, again = gradients("reference"), gradients("auto"), gradients("auto", checkpointed=True)
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 0.03 * wanted[name].norm(), name
        torch.testing.assert_close(again[name], gradient, rtol=1e-2, atol=1e-2 * gradient.abs().max().item())


@pytest.mark.parametrize("qk_norm", [False, True])
def test_module_rotates_a_part_of_its_heads(qk_norm: bool, device: str) -> None:
    config = selfattn.SelfAttentionConfig(head_dim=32, qk_norm=qk_norm, rope_pairing="half", num_kv_heads=2)
    module = selfattn.SelfAttention(128, config, device=device)
    ids = make_ids("packed", 2, 40).to(device)
    parameters = selfattn.RopeParameters(
        rotary_dim=16, rope_type="yarn", factor=4.0, original_max_position_embeddings=16
    )
    freqs = parameters.tables(40, device=device)
    x = torch.randn(2, 40, 128, device=device, requires_grad=True)

    def by_operators(x: Tensor) -> Tensor:
        q, k, v = (getattr(module, f"{name}_proj")(x).view(2, 40, -1, 32) for name in "qkv")
        weights = (module.q_norm.weight, module.k_norm.weight) if qk_norm else (None, None)
        q, k = OPS.qk_norm_rope(q, k, *weights, *freqs, norm=qk_norm, pairing="half")
        out = OPS.multihead_attention(q, k, v, ids, backend="reference")
        return module.out_proj(out.reshape(2, 40, -1))

    leaves = [x, *module.parameters()]
    results = [module(x, freqs, ids), by_operators(x)]
    gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in results]
    for actual, wanted in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True):
        assert error(actual, wanted) < (1e-5 if device == "cpu" else 2e-2) * max(1.0, wanted.abs().max().item())
    assert error(results[0], module(x, segment_ids=ids)) > 1e-2  # which rotates whole heads


def test_module_on_the_meta_device_gives_shapes() -> None:
    config = selfattn.SelfAttentionConfig(head_dim=32, qk_norm=True)
    module = selfattn.SelfAttention(64, config, device="meta")
    x = torch.zeros(2, 12, 64, device="meta", requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert out.shape == x.grad.shape == (2, 12, 64)


def test_compiled_module_keeps_the_one_operator() -> None:
    """Its gradient makes the normalised q and k again, in the compiled graph too."""
    module = selfattn.SelfAttention(64, selfattn.SelfAttentionConfig(head_dim=32, qk_norm=True))
    graphs = []

    def inspect(graph: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=inspect))
    x, ids = torch.randn(2, 12, 64, requires_grad=True), make_ids("packed", 2, 12)
    out = compiled(x, segment_ids=ids)
    torch.testing.assert_close(out, module(x, segment_ids=ids))
    out.square().sum().backward()
    assert any("selfattn.qk_norm_rope_attention.default" in graph for graph in graphs)
    assert any("selfattn.qk_norm_rope_attention_backward.default" in graph for graph in graphs)
