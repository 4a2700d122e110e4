"""qk_norm_rope gives what float64 gives, within twice the error of the formula in its own precision."""

import pytest
import torch
from support.norm_rope import CASES, NormRopeCase, expected, in_own_precision
from support.problems import norm_error

import selfattn

FLOOR = 2e-7


def poison(like: torch.Tensor) -> None:
    """Leaves NaN in the memory that the next results are likely to be allocated in."""
    blocks = [torch.full(like.shape, float("nan"), dtype=like.dtype, device=like.device) for _ in range(2)]
    del blocks


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_equal_float64(case: NormRopeCase, device: str) -> None:
    arguments, tables = case.make(device)
    poison(arguments["q"])
    results = selfattn.qk_norm_rope(**arguments)
    for actual, peer, wanted in zip(
        results, in_own_precision(arguments, tables), expected(arguments, tables), strict=True
    ):
        assert actual.dtype == case.dtype and actual.is_contiguous()
        assert norm_error(actual, wanted) <= 2 * norm_error(peer, wanted) + FLOOR


@pytest.mark.parametrize("position", [0, 1, 4095, 100_003, 2**24 + 1])
@pytest.mark.parametrize("dim", [64, 24])  # with a vector kernel and without
def test_far_positions_keep_their_digits(position: int, dim: int, device: str) -> None:
    """float32 knows an angle of 2^24 to a whole radian."""
    x = torch.zeros(1, 1, 1, dim, device=device)
    x[..., ::2] = 1.0  # pairs (1, 0): they come out as (cos, sin)
    positions = torch.tensor([[position]], device=device)
    q, _ = selfattn.qk_norm_rope(x, x, norm=False, positions=positions)
    angles = position / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    torch.testing.assert_close(q[0, 0, 0, ::2].cpu().double(), angles.cos(), rtol=0, atol=2e-7)
    torch.testing.assert_close(q[0, 0, 0, 1::2].cpu().double(), angles.sin(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64, torch.int16])
def test_positions_of_any_number_type(dtype: torch.dtype, device: str) -> None:
    q, k = torch.randn(2, 5, 3, 32, device=device), torch.randn(2, 5, 1, 32, device=device)
    positions = torch.randint(0, 1000, (2, 5), device=device)
    wanted = selfattn.qk_norm_rope(q, k, positions=positions)
    actual = selfattn.qk_norm_rope(q, k, positions=positions.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))


def test_q_and_k_may_differ_in_all_but_the_device(device: str) -> None:
    q = torch.randn(2, 9, 4, 64, device=device).bfloat16()
    k = torch.randn(1, 5, 3, 24, device=device)
    of_both = selfattn.qk_norm_rope(q, k)
    for actual, x in zip(of_both, (q, k), strict=True):
        assert torch.equal(actual, selfattn.qk_norm_rope(x, x)[0])


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16)])
def test_nothing_gives_nothing(shape: tuple[int, ...], device: str) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    weight = torch.ones(16, device=device, requires_grad=True)
    q, k = selfattn.qk_norm_rope(x, x, weight, weight)
    assert q.shape == k.shape == shape
    (q.sum() + k.sum()).backward()
    assert x.grad.shape == shape and (weight.grad == 0).all()


def test_results_are_new_tensors(device: str) -> None:
    q, k = torch.randn(1, 3, 2, 16, device=device), torch.randn(1, 3, 2, 16, device=device)
    results = selfattn.qk_norm_rope(q, k, norm=False, rope=False)
    for actual, x in zip(results, (q, k), strict=True):
        assert torch.equal(actual, x) and actual.data_ptr() != x.data_ptr()
