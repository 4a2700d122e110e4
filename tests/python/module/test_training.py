"""A training step gives the same gradients however it is run: checkpointed, compiled, in parts, or once more."""

import pytest
import torch
from support.problems import error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from selfattn import SelfAttention, SelfAttentionConfig

E, LENGTH = 128, 90
CONFIG = SelfAttentionConfig(head_dim=32, num_kv_heads=2, qk_norm=True, use_bias=True, sinks=True)
DTYPES = [torch.float32, torch.bfloat16]


def make_step(device: str, dtype: torch.dtype, **changes) -> tuple[SelfAttention, Tensor, Tensor, Tensor]:
    """A module, its input, ids with padding, and the gradient of the output."""
    config = SelfAttentionConfig(**(CONFIG.to_dict() | changes))
    module = SelfAttention(E, config, device=device, dtype=dtype)
    torch.nn.init.normal_(module.out_proj.weight, std=E**-0.5)  # so that no gradient is small
    ids = (torch.rand(4, LENGTH) < 1 / 20).cumsum(1)
    ids[:, LENGTH - 7 :] = -1
    x, grad = (torch.randn(4, LENGTH, E).to(device, dtype) for _ in range(2))
    return module, x.requires_grad_(), ids.to(device), grad


def gradients(out: Tensor, module: SelfAttention, x: Tensor, grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, [x, *module.parameters()], grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_steps_give_the_same_bits_where_asked(dtype: torch.dtype, device: str, deterministic: None) -> None:
    module, x, ids, grad = make_step(device, dtype)
    first = gradients(module(x, segment_ids=ids), module, x, grad)
    for _ in range(3):
        again = gradients(module(x, segment_ids=ids), module, x, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_rate", [0.0, 0.3])
def test_checkpoint_gives_the_same_bits(
    dtype: torch.dtype, dropout_rate: float, device: str, deterministic: None
) -> None:
    module, x, ids, grad = make_step(device, dtype, dropout_rate=dropout_rate)
    torch.manual_seed(1)
    out = module(x, segment_ids=ids)
    torch.manual_seed(1)
    checkpointed = checkpoint(module, x, None, ids, use_reentrant=False)
    assert torch.equal(checkpointed, out)
    expected = gradients(out, module, x, grad)
    actual = gradients(checkpointed, module, x, grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_two_half_batches_are_one_batch(device: str) -> None:
    module, x, ids, grad = make_step(device, torch.float32)
    module(x, segment_ids=ids).backward(grad)
    whole = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        module(x[half], segment_ids=ids[half]).backward(grad[half])
    for parameter, expected in zip(module.parameters(), whole, strict=True):
        assert error(parameter.grad, expected) < 1e-5


def test_gradients_add_to_what_is_there(device: str) -> None:
    module, x, ids, grad = make_step(device, torch.float32)
    out = gradients(module(x, segment_ids=ids), module, x, grad)
    for tensor in (x, *module.parameters()):
        tensor.grad = torch.ones_like(tensor)
    module(x, segment_ids=ids).backward(grad)
    for tensor, alone in zip((x, *module.parameters()), out, strict=True):
        assert error(tensor.grad, alone + 1) < 1e-5


def test_only_what_asks_for_a_gradient_gets_one(device: str) -> None:
    module, x, ids, grad = make_step(device, torch.float32)
    everything = dict(zip(["x", *dict(module.named_parameters())], gradients(
        module(x, segment_ids=ids), module, x, grad
    ), strict=True))  # fmt: skip
    module.requires_grad_(False)
    module.k_norm.weight.requires_grad_()
    module(x.detach(), segment_ids=ids).backward(grad)
    assert error(module.k_norm.weight.grad, everything["k_norm.weight"]) < 1e-5
    assert all(p.grad is None for name, p in module.named_parameters() if name != "k_norm.weight")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_step_is_one_graph_and_equals_eager_on_a_gpu(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    module, x, ids, grad = make_step("cuda", dtype)
    compiled = torch.compile(module, fullgraph=True)
    expected = module(x, segment_ids=ids)
    actual = compiled(x, segment_ids=ids)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert error(actual, expected) < tolerance
    for one, other in zip(gradients(actual, module, x, grad), gradients(expected, module, x, grad), strict=True):
        assert error(one, other) < tolerance
