"""The rotary operators rotate each pair by its position's angle, in both pairings, and differentiate."""

import pytest
import torch
from support import reference
from support.cases import ROUNDING
from support.problems import error

import selfattn

PAIRINGS = ("interleaved", "half")
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 4096], [3, 4, 5, 6, 100000, 0]])


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_frequencies_are_position_over_power_of_theta(theta: float, dtype: torch.dtype) -> None:
    sin, cos = selfattn.precompute_freqs(16, POSITIONS, theta=theta, dtype=dtype)
    assert sin.dtype == cos.dtype == dtype
    for actual, expected in zip((sin, cos), reference.rotary_frequencies(16, POSITIONS, theta), strict=True):
        # An angle of 1e5 is known to 1e-11 in float64.
        assert error(actual, expected) < max(ROUNDING[dtype], 1e-10)


def test_frequencies_default_to_float32_and_count_from_zero() -> None:
    sin, cos = selfattn.precompute_freqs(8, max_length=5)
    assert sin.dtype == torch.float32 and sin.shape == cos.shape == (1, 5, 4)
    expected, _ = selfattn.precompute_freqs(8, torch.arange(5))
    assert torch.equal(sin, expected)


def test_no_positions_give_empty_frequencies() -> None:
    assert selfattn.precompute_freqs(8, max_length=0)[0].shape == (1, 0, 4)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rotation_equals_complex_multiplication(pairing: str, dtype: torch.dtype) -> None:
    xq, xk = torch.randn(2, 6, 4, 16).to(dtype), torch.randn(2, 6, 2, 16).to(dtype)
    sin, cos = selfattn.precompute_freqs(16, POSITIONS, dtype=torch.float64)
    rotated = selfattn.apply_rotary_emb(xq, xk, sin.float(), cos.float(), pairing=pairing)
    for actual, x in zip(rotated, (xq, xk), strict=True):
        assert actual.dtype == dtype
        assert error(actual, reference.rotate(x, sin, cos, pairing)) < max(ROUNDING[dtype], 1e-6)


@pytest.mark.parametrize("rotary_dim", [2, 8, 14])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_narrow_frequencies_rotate_the_first_elements(pairing: str, dtype: torch.dtype, rotary_dim: int) -> None:
    xq, xk = torch.randn(2, 6, 4, 16).to(dtype), torch.randn(2, 6, 2, 15).to(dtype)
    sin, cos = selfattn.precompute_freqs(rotary_dim, POSITIONS, dtype=torch.float64)
    rotated = selfattn.apply_rotary_emb(xq, xk, sin.float(), cos.float(), pairing=pairing)
    for actual, x in zip(rotated, (xq, xk), strict=True):
        assert torch.equal(actual[..., rotary_dim:], x[..., rotary_dim:])
        assert error(actual, reference.rotate(x, sin, cos, pairing)) < max(ROUNDING[dtype], 1e-6)
        alone, _ = selfattn.apply_rotary_emb(x[..., :rotary_dim], x[..., :rotary_dim], sin, cos, pairing=pairing)
        assert error(actual[..., :rotary_dim], alone) < max(ROUNDING[dtype], 1e-6)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_frequencies_with_a_factor_scale_what_they_rotate(pairing: str) -> None:
    """sin^2 + cos^2 is the factor's square, in the gradient too."""
    q, k = (torch.randn(2, 6, heads, 16, requires_grad=True) for heads in (4, 2))
    sin, cos = selfattn.precompute_freqs(12, POSITIONS)
    plain, scaled = (selfattn.apply_rotary_emb(q, k, c * sin, c * cos, pairing=pairing) for c in (1.0, 1.5))
    grads = [torch.randn_like(x) for x in (q, k)]
    of_plain, of_scaled = (torch.autograd.grad(results, (q, k), grads) for results in (plain, scaled))
    for one, other in zip((*plain, *of_plain), (*scaled, *of_scaled), strict=True):
        assert error(other[..., :12], 1.5 * one[..., :12].double()) < 1e-6
        assert torch.equal(other[..., 12:], one[..., 12:])


def test_frequencies_may_be_narrower_than_q_and_as_wide_as_k() -> None:
    q, k = torch.randn(2, 6, 4, 32), torch.randn(2, 6, 2, 16)
    freqs = selfattn.precompute_freqs(16, POSITIONS)
    turned_q, turned_k = selfattn.qk_norm_rope(q, k, None, None, *freqs)
    assert torch.equal(turned_q, selfattn.qk_norm_rope(q, q, None, None, *freqs)[0])
    assert torch.equal(turned_k, selfattn.qk_norm_rope(k, k, None, None, *freqs)[0])


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_scores_depend_on_the_distance_alone(pairing: str) -> None:
    q, k = torch.randn(1, 1, 1, 32, dtype=torch.float64), torch.randn(1, 1, 1, 32, dtype=torch.float64)

    def score(query_position: int, key_position: int) -> float:
        freqs = [selfattn.precompute_freqs(32, torch.tensor([[p]])) for p in (query_position, key_position)]
        turned_q, _ = selfattn.apply_rotary_emb(q, q, *freqs[0], pairing=pairing)
        turned_k, _ = selfattn.apply_rotary_emb(k, k, *freqs[1], pairing=pairing)
        return (turned_q * turned_k).sum().item()

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(4, 9), abs=1e-2)


def test_pairings_differ_by_a_permutation_of_the_elements() -> None:
    x = torch.randn(1, 5, 2, 8)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    interleaved, _ = selfattn.apply_rotary_emb(x, x)
    half, _ = selfattn.apply_rotary_emb(x[..., order], x[..., order], pairing="half")
    assert error(interleaved[..., order], half) < 1e-6


def test_absent_frequencies_use_theta() -> None:
    x = torch.randn(1, 5, 2, 8)
    freqs = selfattn.precompute_freqs(8, max_length=5, theta=100.0)
    expected, _ = selfattn.apply_rotary_emb(x, x, *freqs)
    assert error(selfattn.apply_rotary_emb(x, x, theta=100.0)[0], expected) < 1e-6
    assert error(selfattn.apply_rotary_emb(x, x)[0], expected) > 1e-2


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rope", [True, False])
def test_qk_norm_rope_is_norm_then_rotation(pairing: str, norm: bool, rope: bool) -> None:
    q, k = torch.randn(2, 6, 4, 16), torch.randn(2, 6, 2, 16)
    weights = (torch.randn(16), torch.randn(16)) if norm else (None, None)
    actual = selfattn.qk_norm_rope(
        q,
        k,
        *weights,
        norm=norm,
        rope=rope,
        eps=1e-3,
        positions=POSITIONS if rope else None,
        theta=300.0,
        pairing=pairing,
    )
    sin, cos = reference.rotary_frequencies(16, POSITIONS, 300.0)
    for out, x, weight in zip(actual, (q, k), weights, strict=True):
        expected = reference.rms_norm(x, weight, 1e-3) if norm else x.double()
        expected = reference.rotate(expected, sin, cos, pairing) if rope else expected
        assert error(out, expected) < 2e-6


def test_qk_norm_rope_takes_frequencies_or_positions() -> None:
    q, k = torch.randn(2, 6, 4, 16), torch.randn(2, 6, 2, 16)
    by_positions = selfattn.qk_norm_rope(q, k, positions=POSITIONS)
    sin, cos = selfattn.precompute_freqs(16, POSITIONS)
    by_frequencies = selfattn.qk_norm_rope(q, k, freqs_sin=sin, freqs_cos=cos)
    for actual, expected in zip(by_frequencies, by_positions, strict=True):
        assert error(actual, expected) < 1e-6


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_gradients_are_right(pairing: str) -> None:
    q = torch.randn(1, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 3, 1, 6, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def function(q, k, q_weight, k_weight):
        return selfattn.qk_norm_rope(q, k, q_weight, k_weight, eps=1e-2, theta=10.0, pairing=pairing)

    assert torch.autograd.gradcheck(function, (q, k, *weights))
    assert torch.autograd.gradgradcheck(function, (q, k, *weights))


def test_strided_heads_are_taken_as_they_are() -> None:
    packed = torch.randn(2, 6, 3, 4, 16)
    q, k = packed[:, :, 0], packed[:, :, 1].transpose(1, 2).contiguous().transpose(1, 2)
    actual = selfattn.apply_rotary_emb(q, k)
    expected = selfattn.apply_rotary_emb(q.contiguous(), k.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
