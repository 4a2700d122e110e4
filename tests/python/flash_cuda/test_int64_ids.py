"""int64 ids on CUDA give the bits of int32 ids and launch no more kernels, forward, backward and as one operator."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from support.launches import launches
from support.problems import make_ids
from torch import Tensor

import selfattn
from selfattn import SelfAttention, SelfAttentionConfig

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("deterministic")]

OPS = torch.ops.selfattn
BATCH, LENGTH = 2, 333
KINDS = ["packed", "shuffled", "mixed_padding"]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda ids: ids.long(),
    "every_second": lambda ids: torch.stack([ids, 5 - ids], dim=-1).long()[..., 0],
    "transposed": lambda ids: ids.t().long().contiguous().t(),
    "expanded": lambda ids: ids[:1].long().expand(BATCH, -1),
    "at_8_bytes": lambda ids: torch.cat([ids.new_zeros(1), ids.flatten()]).long()[1:].view(ids.shape),
}
MIXED = [(torch.int32, torch.int64), (torch.int64, torch.int32)]


def leaves() -> list[Tensor]:
    """q, k, v and the weights of their norms."""
    generator = torch.Generator("cuda").manual_seed(0)
    heads = [torch.randn(BATCH, LENGTH, n, 64, device="cuda", generator=generator).bfloat16() for n in (4, 2, 2)]
    return [tensor.requires_grad_() for tensor in (*heads, *torch.full((2, 64), 0.5, device="cuda").unbind())]


def attend(tensors: list[Tensor], ids: Tensor, kv_ids: Tensor | None = None) -> Tensor:
    return selfattn.multihead_attention(*tensors[:3], ids, backend="flash", kv_segment_ids=kv_ids)


def norm_rotate_and_attend(tensors: list[Tensor], ids: Tensor) -> Tensor:
    q, k, v, *weights = tensors
    return OPS.qk_norm_rope_attention(q, k, v, *weights, None, None, ids)[0]


def results(function: Callable[..., Tensor], *ids: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    tensors = leaves()
    out = function(tensors, *ids)
    out.backward(torch.linspace(-1, 1, out.numel(), device="cuda").to(out.dtype).view(out.shape))
    return [out, *(tensor.grad for tensor in tensors if tensor.grad is not None)]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for mine, other in zip(actual, expected, strict=True):
        assert torch.equal(mine, other)


def as_int32(ids: Tensor) -> Tensor:
    return ids.to(torch.int32, memory_format=torch.contiguous_format)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [attend, norm_rotate_and_attend])
def test_results_and_gradients_are_those_of_int32(function: Callable[..., Tensor], kind: str, layout: str) -> None:
    ids = LAYOUTS[layout](make_ids(kind, BATCH, LENGTH).cuda())
    assert_same_bits(results(function, ids), results(function, as_int32(ids)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_own_ids_of_the_keys_are_read_too(kind: str, layout: str) -> None:
    ids, kv_ids = (LAYOUTS[layout](make_ids(kind, BATCH, LENGTH).cuda()) for _ in range(2))
    assert_same_bits(results(attend, ids, kv_ids), results(attend, as_int32(ids), as_int32(kv_ids)))


@pytest.mark.parametrize("types", MIXED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_two_types_are_those_of_one(kind: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    ids, kv_ids = (make_ids(kind, BATCH, LENGTH).cuda() for _ in range(2))
    assert_same_bits(results(attend, ids.to(types[0]), kv_ids.to(types[1])), results(attend, ids, kv_ids))


def test_operators_take_ids_of_two_types() -> None:
    """flash_attention_backward called by itself, with what a forward call gave."""
    q, k, v = (tensor.detach() for tensor in leaves()[:3])
    ids, kv_ids = (make_ids("shuffled", BATCH, LENGTH).cuda() for _ in range(2))
    out, lse = OPS.flash_attention(q, k, v, ids, kv_segment_ids=kv_ids)
    expected = OPS.flash_attention_backward(out, None, q, k, v, out, lse, ids, kv_segment_ids=kv_ids)
    for types in [*MIXED, (torch.int64, torch.int64)]:
        mine, keys = ids.to(types[0]), kv_ids.to(types[1])
        assert_same_bits(OPS.flash_attention(q, k, v, mine, kv_segment_ids=keys), (out, lse))
        actual = OPS.flash_attention_backward(out, None, q, k, v, out, lse, mine, kv_segment_ids=keys)
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_module_trains_as_with_int32(qk_norm: bool) -> None:
    module = SelfAttention(128, SelfAttentionConfig(head_dim=64, qk_norm=qk_norm), device="cuda", dtype=torch.bfloat16)
    x = torch.randn(BATCH, LENGTH, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = make_ids("packed", BATCH, LENGTH).cuda()

    def step(ids: Tensor) -> list[Tensor]:
        out = module(x, segment_ids=ids)
        return [out, *torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])]

    assert_same_bits(step(ids.long()), step(ids))


def assert_no_more_launches(call: Callable[[Tensor], Callable[[], object]]) -> None:
    """``call(ids)`` makes what is counted."""
    ids = make_ids("packed", BATCH, LENGTH).cuda()
    narrow, wide = launches(call(ids)), launches(call(ids.long()))
    assert any("segments" in name for name in wide), wide
    assert len(wide) <= len(narrow), (wide, narrow)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("function", [attend, norm_rotate_and_attend])
def test_forward_launches_no_more_kernels(function: Callable[..., Tensor], is_training: bool) -> None:
    tensors = leaves()
    with torch.set_grad_enabled(is_training):
        assert_no_more_launches(lambda ids: lambda: function(tensors, ids))


@pytest.mark.parametrize("function", [attend, norm_rotate_and_attend])
def test_backward_launches_no_more_kernels(function: Callable[..., Tensor]) -> None:
    tensors = leaves()

    def backward(ids: Tensor) -> Callable[[], object]:
        out = function(tensors, ids)
        grad = torch.ones_like(out)
        return lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True, allow_unused=True)

    assert_no_more_launches(backward)


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**32])
@pytest.mark.parametrize("side", ["segment_ids", "kv_segment_ids"])
def test_an_id_outside_int32_trips_a_device_assertion(side: str, value: int) -> None:
    """In a process of its own: nothing runs on the device after it."""
    program = f"""
import torch, selfattn
q = torch.zeros(1, 300, 2, 64, device="cuda", dtype=torch.bfloat16)
ids = {{name: torch.zeros(1, 300, device="cuda", dtype=torch.int64) for name in ("segment_ids", "kv_segment_ids")}}
ids["{side}"][0, 217] = {value}
if "{side}" == "segment_ids":
    del ids["kv_segment_ids"]
torch.cuda.synchronize()
print("ready", flush=True)
selfattn.multihead_attention(q, q, q, backend="flash", **ids)
torch.cuda.synchronize()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    output = run.stdout + run.stderr
    assert run.returncode != 0, output
    assert "ready" in output and "segment ids must fit in int32" in output, output
