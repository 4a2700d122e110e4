"""The module holds no tensor longer than it must: counted in (tokens, E) tensors above what a step begins with."""

import itertools

import pytest
import torch
from support.memory import peak_of
from support.problems import make_ids
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import selfattn

BATCH, LENGTH, EMBEDDING, DIM = 4, 1024, 1024, 128
TENSOR = 2 * BATCH * LENGTH * EMBEDDING  # bytes, bfloat16
WEIGHT = 2 * EMBEDDING * EMBEDDING
SLACK = TENSOR // 2  # logsumexp, statistics of rows, tables of segments, small gradients


def make(device: str, **config) -> tuple[selfattn.SelfAttention, Tensor, Tensor]:
    config = selfattn.SelfAttentionConfig(head_dim=DIM, **config)
    module = selfattn.SelfAttention(EMBEDDING, config, device=device, dtype=torch.bfloat16)
    x = torch.randn(BATCH, LENGTH, EMBEDDING, device=device).bfloat16().requires_grad_()
    return module, x, make_ids("packed", BATCH, LENGTH).to(device)


def peak_on_cpu(call) -> int:
    """As ``peak_of``, from the profiler's record of what was allocated and freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_forward_frees_the_raw_heads_before_the_attention(qk_norm: bool) -> None:
    module = selfattn.SelfAttention(512, selfattn.SelfAttentionConfig(head_dim=64, qk_norm=qk_norm))
    x = torch.randn(2, 1024, 512)
    with torch.no_grad():
        module(x)
        assert peak_on_cpu(lambda: module(x)) <= 5.5 * 4 * x.numel()  # with them alive: 6


@pytest.mark.gpu
@pytest.mark.parametrize("qk_norm", [False, True])
def test_forward_without_gradients_frees_the_raw_heads(qk_norm: bool) -> None:
    module, x, ids = make("cuda", qk_norm=qk_norm)
    with torch.no_grad():
        peak = peak_of(lambda: module(x, segment_ids=ids))
    assert peak <= 5 * TENSOR + SLACK  # q, k, v and the rotated q, k; or v, the rotated q, k, and the output


@pytest.mark.gpu
@pytest.mark.parametrize("qk_norm", [False, True])
def test_training_step_writes_gradients_over_what_is_read(qk_norm: bool) -> None:
    module, x, ids = make("cuda", qk_norm=qk_norm)
    leaves, grad = [x, *module.parameters()], torch.randn_like(x)
    torch.use_deterministic_algorithms(True)  # the attention's gradient needs no float32 sum
    peak = peak_of(lambda: torch.autograd.grad(module(x, segment_ids=ids), leaves, grad))
    # The module's output, its gradient's product, q, k, v, the attention's output; with the norm also raw q and k.
    assert peak <= (8 if qk_norm else 6) * TENSOR + WEIGHT + SLACK


def step(device: str, qk_norm: bool, prepare) -> dict[str, Tensor]:
    """Gradients of a step from one seed; ``prepare(module, x, ids)`` gives the output."""
    torch.manual_seed(0)
    config = selfattn.SelfAttentionConfig(head_dim=32, qk_norm=qk_norm, sinks=True)
    module = selfattn.SelfAttention(128, config, device=device)
    module = module if device == "cpu" else module.bfloat16()
    x = torch.randn(2, 48, 128, device=device).to(module.q_proj.weight.dtype).requires_grad_()
    out, keeps_graph = prepare(module, x, make_ids("packed", 2, 48).to(device))
    out.float().square().sum().backward(retain_graph=keeps_graph)
    return {"x": x.grad} | {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_gradients_do_not_depend_on_who_else_holds_memory(qk_norm: bool, device: str) -> None:
    """Saved tensors that hooks keep, and graphs that are kept, are not written over."""
    kept: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor, tensor.detach().clone()))
        return tensor

    def with_hooks(module, x, ids):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return module(x, segment_ids=ids), False

    torch.use_deterministic_algorithms(True)
    wanted = step(device, qk_norm, lambda module, x, ids: (module(x, segment_ids=ids), False))
    retained = step(device, qk_norm, lambda module, x, ids: (module(x, segment_ids=ids), True))
    hooked = step(device, qk_norm, with_hooks)
    for name, gradient in wanted.items():
        assert torch.equal(retained[name], gradient) and torch.equal(hooked[name], gradient), name
    assert kept and all(torch.equal(tensor.detach(), copy) for tensor, copy in kept)


def test_heads_of_a_caller_are_not_written_over(device: str) -> None:
    leaves = [torch.randn(2, 40, 4, 32, device=device).bfloat16().requires_grad_() for _ in range(3)]
    q, k, v = (2 * leaf for leaf in leaves)
    copies = [tensor.detach().clone() for tensor in (q, k, v)]
    views = [tensor.detach() for tensor in (q, k, v)]  # the memory, without what leads to the graph
    out = selfattn.multihead_attention(q, k, v)
    held, copy = out.detach(), out.detach().clone()
    loss = out.float().square().sum()
    del q, k, v, out
    loss.backward()
    assert torch.equal(held, copy)
    assert all(torch.equal(view, before) for view, before in zip(views, copies, strict=True))
