"""On the CPU, qk_scale and softcap at the ends of what is taken give the formula, where no float holds them too."""

import pytest
import torch
from support.problems import dense_attention

import selfattn  # noqa: F401  (registers the operators)

# Factors of q and k, qk_scale, softcap: the logits, as they come out, are of ordinary size or beyond the cap.
NUMBERS = [
    (1.0, 1.0, 1e-300, 0.0),
    (1.0, 1.0, -1e-300, 0.0),
    (1.0, 1.0, 1e-40, 0.0),
    (1e18, 1e18, 1e-37, 0.0),
    (1e-18, 1e-19, 1e37, 0.0),
    (1e-18, 1e-19, -1e37, 0.0),
    (1.0, 1.0, 0.3, 1e-30),
    (1.0, 1.0, 0.3, 1e30),
    (1.0, 1.0, 1e-300, 1e30),
    (1.0, 1.0, 1e300, 2.0),
    (1.0, 1.0, 0.0, 1e-30),
    (1.0, 1.0, 0.0, 0.0),
]


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("num_keys", [40, 1500])  # as one part, and split over keys
def test_extreme_numbers_give_the_formula(numbers: tuple[float, float, float, float], num_keys: int) -> None:
    q_factor, k_factor, qk_scale, softcap = numbers
    q = torch.randn(1, 20, 2, 16) * q_factor
    k, v = torch.randn(1, num_keys, 2, 16) * k_factor, torch.randn(1, num_keys, 2, 16)
    grad_out = torch.randn(1, 20, 2, 16)
    options = {"causal": False, "qk_scale": qk_scale, "softcap": softcap}
    out, lse = torch.ops.selfattn.flash_attention(q, k, v, **options)
    grads = torch.ops.selfattn.flash_attention_backward(grad_out, None, q, k, v, out, lse, **options)

    exact = dense_attention(q, k, v, **options, grad_out=grad_out)
    assert exact["out"].isfinite().all()

    torch.testing.assert_close(out.double(), exact["out"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact["lse"], rtol=1e-5, atol=1e-5)
    for actual, name in zip(grads, ("dq", "dk", "dv"), strict=True):
        expected = exact[name]
        # A float holds nothing beyond 3.4e38, where the gradient may be, and nothing below 1e-45.
        fits = expected.abs() < 3e38
        assert (actual[~fits].abs() > 1e38).all()
        largest = expected[fits].abs().max().item() if fits.any() else 0.0
        torch.testing.assert_close(actual.double()[fits], expected[fits], rtol=1e-3, atol=1e-4 * largest + 1e-44)
