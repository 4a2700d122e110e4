"""CUDA flash with head dimensions that are no multiple of 16 bytes: nothing outside of the rows is read or written, and
nothing is copied or filled up on the way."""

import copy
import math

import pytest
import torch
from support.cases import UNALIGNED_DIMS, UNALIGNED_PAIRS
from support.memory import peak_of
from torch import Tensor

import selfattn

pytestmark = pytest.mark.gpu

OPS = torch.ops.selfattn
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PAIRS = [*((dim, dim) for dim in UNALIGNED_DIMS), *UNALIGNED_PAIRS]


def results(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, **options: object) -> dict[str, Tensor]:
    out, lse = OPS.flash_attention(q, k, v, **options)
    gradients = OPS.flash_attention_backward(grad, None, q, k, v, out, lse, **options)
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def in_heads(tensor: Tensor, value: float) -> Tensor:
    """The same numbers as heads 1, 3, .. of a tensor whose other heads hold ``value``."""
    room = torch.full((*tensor.shape[:2], 2 * tensor.shape[2] + 1, tensor.shape[3]), value, device="cuda")
    room = room.to(tensor.dtype)
    room[:, :, 1::2] = tensor
    return room[:, :, 1::2]


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("dims", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_heads_are_not_read(
    dtype: torch.dtype, dims: tuple[int, int], softcap: float, deterministic: None
) -> None:
    """They lie right before and behind each row."""
    q, k, v, grad = (
        torch.randn(2, 150, 2, dim, device="cuda").to(dtype) for dim in (dims[0], dims[0], dims[1], dims[1])
    )
    wanted = results(q, k, v, grad, softcap=softcap)
    for value in (math.nan, math.inf, 1e4):
        found = results(*(in_heads(tensor, value) for tensor in (q, k, v, grad)), softcap=softcap)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("shift", range(1, 9))
@pytest.mark.parametrize("dim", [1, 33, 96, 99, 100, 250])
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_element_may_stand_anywhere(dtype: torch.dtype, dim: int, shift: int, deterministic: None) -> None:
    def shifted(tensor: Tensor) -> Tensor:
        room = torch.full((tensor.numel() + 16,), math.nan, dtype=dtype, device="cuda")
        place = room[shift : shift + tensor.numel()].view(tensor.shape)
        place.copy_(tensor)
        return place

    tensors = [torch.randn(2, 150, 3, dim, device="cuda").to(dtype) for _ in range(4)]
    wanted, found = results(*tensors), results(*map(shifted, tensors))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("dim", [7, 65, 99, 250])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_in_given_memory_leave_what_lies_around(dtype: torch.dtype, dim: int, is_deterministic: bool) -> None:
    torch.use_deterministic_algorithms(is_deterministic)
    q, k, v, grad = (torch.randn(2, 200, 3, dim, device="cuda").to(dtype) for _ in range(4))
    out, lse = OPS.flash_attention(q, k, v)
    rooms = [torch.full((q.numel() + 2,), 7.0, dtype=dtype, device="cuda") for _ in range(3)]
    dq, dk, dv = (room[1:-1].view(q.shape) for room in rooms)
    OPS.flash_attention_backward.into(grad, None, q, k, v, out, lse, dq=dq, dk=dk, dv=dv)
    wanted = OPS.flash_attention_backward(grad, None, q, k, v, out, lse)
    for room, found, expected in zip(rooms, (dq, dk, dv), wanted, strict=True):
        assert room[0] == 7 and room[-1] == 7
        assert (found.float() - expected.float()).norm() <= 1e-2 * expected.float().norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_that_of_the_width_that_the_kernels_have(dtype: torch.dtype) -> None:
    def peak(dim: int) -> int:
        q, k, v, grad = (torch.randn(1, 8192, 16, dim, device="cuda").to(dtype) for _ in range(4))
        return peak_of(lambda: results(q, k, v, grad))

    for dim in (99, 100, 101):
        assert peak(dim) <= 1.5 * peak(128)
    # Without the sums of dQ: what is returned, and little else.
    torch.use_deterministic_algorithms(True)
    returned = 4 * 8192 * 16 * 99 * dtype.itemsize
    assert peak(99) <= 1.1 * returned


@pytest.mark.parametrize("dims", PAIRS)
def test_auto_takes_the_kernels(dims: tuple[int, int]) -> None:
    for dtype in DTYPES:
        q, v = (torch.randn(1, 64, 2, dim, device="cuda", dtype=dtype) for dim in dims)
        ids = torch.zeros(1, 64, dtype=torch.int32, device="cuda")
        sinks = torch.zeros(2, device="cuda", dtype=dtype)
        said = selfattn.explain_backend(q, q, v, ids, softcap=5.0, sinks=sinks, window_left=9)
        assert said.startswith("flash: chosen")


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("head_dim", [6, 50, 100, 250])
def test_layer_trains_as_in_float64(head_dim: int, qk_norm: bool) -> None:
    """With ``qk_norm`` by the operator that joins norm, rotation and attention."""
    config = selfattn.SelfAttentionConfig(head_dim=head_dim, qk_norm=qk_norm)
    layer = selfattn.SelfAttention(2 * head_dim, config, device="cuda")
    exact = copy.deepcopy(layer).cpu().double()
    x = torch.randn(2, 200, 2 * head_dim, device="cuda", requires_grad=True)
    ids = torch.arange(200, device="cuda").div(70, rounding_mode="floor").int().expand(2, -1)
    y = layer(x, segment_ids=ids)
    expected_x = x.detach().cpu().double().requires_grad_()
    expected = exact(expected_x, segment_ids=ids.cpu())
    grad = torch.randn_like(expected)
    y.backward(grad.to(y))
    expected.backward(grad)
    pairs = [(y, expected), (x.grad, expected_x.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(layer.parameters(), exact.parameters(), strict=True)]
    for found, wanted in pairs:
        assert (found.cpu().double() - wanted).norm() <= 1e-3 * wanted.norm()
