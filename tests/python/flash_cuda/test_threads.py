"""A thread whose first use of CUDA is the flash backend: a server's worker, or autograd's."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import selfattn  # noqa: F401

pytestmark = pytest.mark.gpu

OPS = torch.ops.selfattn


def in_a_new_thread(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(call).result()


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_first_call_of_a_thread(dim: int, with_ids: bool) -> None:
    q, k, v = (torch.randn(1, 200, 2, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    ids = torch.arange(200, dtype=torch.int32, device="cuda").div(60, rounding_mode="floor")[None] if with_ids else None
    grad_out = torch.randn_like(q)
    # Once in this thread, so that the allocator holds memory and what is asked once a device has been asked.
    out, lse = OPS.flash_attention(q, k, v, ids)
    gradients = OPS.flash_attention_backward(grad_out, None, q, k, v, out, lse, ids)
    torch.cuda.synchronize()
    again = in_a_new_thread(lambda: OPS.flash_attention(q, k, v, ids))
    assert torch.equal(again[0], out)
    of_thread = in_a_new_thread(lambda: OPS.flash_attention_backward(grad_out, None, q, k, v, out, lse, ids))
    for actual, expected in zip(of_thread, gradients, strict=True):
        torch.testing.assert_close(actual, expected)
