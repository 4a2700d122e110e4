"""The module holds no tensor longer than it must: counted in (tokens, E) tensors above what a step begins with."""

import itertools

import pytest
import torch
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


def peak_of(call) -> int:
    call()  # workspaces of libraries stay
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


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
    try:
        peak = peak_of(lambda: torch.autograd.grad(module(x, segment_ids=ids), leaves, grad))
    finally:
        torch.use_deterministic_algorithms(False)
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
    try:
        wanted = step(device, qk_norm, lambda module, x, ids: (module(x, segment_ids=ids), False))
        retained = step(device, qk_norm, lambda module, x, ids: (module(x, segment_ids=ids), True))
        hooked = step(device, qk_norm, with_hooks)
    finally:
        torch.use_deterministic_algorithms(False)
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


@pytest.mark.parametrize("qk_norm", [False, True])
def test_in_place_gradient_of_qk_norm_rope_is_the_same(qk_norm: bool, device: str) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for dtype, dim in ((dtype, dim) for dtype in dtypes for dim in (48, 64, 128, 24)):
        q, k, dq, dk = (torch.randn(2, 9, n, dim, device=device).to(dtype) for n in (4, 2, 4, 2))
        heads = (q, k, *(torch.rand(dim, device=device) for _ in range(2))) if qk_norm else (None,) * 4
        for pairing in ("interleaved", "half"):
            options = {"norm": qk_norm, "pairing": pairing}
            wanted = torch.ops.selfattn.qk_norm_rope_backward(dq, dk, *heads, **options)
            found = dq.clone(), dk.clone()
            weights = torch.ops.selfattn.qk_norm_rope_backward.in_place(*found, *heads, **options)
            assert all(torch.equal(a, b) for a, b in zip((*found, *weights), wanted, strict=True)), (dtype, dim)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["packed", "shuffled", None])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_gradient_of_the_attention_over_its_inputs_is_the_same(kind, dim: int, is_deterministic: bool) -> None:
    """Short rows and long ones: both forms of the backward pass."""
    for batch, length in ((3, 300), (2, 6000)):
        q, k, v, grad = (torch.randn(batch, length, 4, dim, device="cuda").bfloat16() for _ in range(4))
        ids = None if kind is None else make_ids(kind, batch, length).cuda()
        if kind == "packed" and length > 5000:
            ids = torch.zeros_like(ids)  # one document: the fused form
        torch.use_deterministic_algorithms(is_deterministic)
        try:
            out, lse = torch.ops.selfattn.flash_attention(q, k, v, ids)
            wanted = torch.ops.selfattn.flash_attention_backward(grad, None, q, k, v, out, lse, ids)
            dq, dk, dv = out.clone(), k.clone(), v.clone()
            call = torch.ops.selfattn.flash_attention_backward.into
            call(grad, None, q, dk, dv, dq, lse, ids, dq=dq, dk=dk, dv=dv)
        finally:
            torch.use_deterministic_algorithms(False)
        for found, expected, name in zip((dq, dk, dv), wanted, ("dq", "dk", "dv"), strict=True):
            if is_deterministic or name != "dq":
                assert torch.equal(found, expected), (name, batch, length)
            else:  # float32 additions in any order
                error = (found.float() - expected.float()).norm() / expected.float().norm()
                assert error < 1e-3, (name, batch, length)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["one_document", "shuffled"])
@pytest.mark.parametrize("dim", [64, 128])
def test_long_documents_of_many_batches_are_as_alone(kind: str, dim: int) -> None:
    """The fused form takes a few batches at a time, with one memory for the sum of dQ."""
    batch, length, heads = 8, 6000, 4  # 188 tiles of keys a batch, of 1024 a launch
    q, k, v, grad = (torch.randn(batch, length, heads, dim, device="cuda").bfloat16() for _ in range(4))
    grad_lse = torch.randn(batch, heads, length, device="cuda")
    ids = make_ids(kind, batch, length).cuda()
    out, lse = torch.ops.selfattn.flash_attention(q, k, v, ids)
    inputs = (grad, grad_lse, q, k, v, out, lse, ids)
    found = torch.ops.selfattn.flash_attention_backward(*inputs)
    for row in range(batch):
        alone = torch.ops.selfattn.flash_attention_backward(*(t[row : row + 1] for t in inputs))
        for gradient, expected, name in zip(found, alone, ("dq", "dk", "dv"), strict=True):
            difference = (gradient[row].float() - expected[0].float()).norm() / expected.float().norm()
            assert difference < 1e-3, (name, row)


@pytest.mark.gpu
def test_sum_of_dq_is_kept_small_where_it_may_not_be_needed() -> None:
    batch, length, heads, dim = 4, 4096, 32, 128  # 1024 tiles of keys a batch: one a launch
    q, k, v, grad = (torch.randn(batch, length, heads, dim, device="cuda").bfloat16() for _ in range(4))
    ids = torch.arange(length, device="cuda").div(256, rounding_mode="floor").int().expand(batch, length).contiguous()
    out, lse = torch.ops.selfattn.flash_attention(q, k, v, ids)
    peak = peak_of(lambda: torch.ops.selfattn.flash_attention_backward(grad, None, q, k, v, out, lse, ids))
    tensor = 2 * q.numel()
    assert peak <= 3 * tensor + 2 * tensor // batch + tensor // 8  # dq, dk, dv; float32 of one batch; statistics
