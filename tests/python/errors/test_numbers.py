"""A number at the end of its type is either served with what it means, or refused by the name of its argument."""

import sys

import pytest
import torch
from support import reference

import selfattn

Q, K, V = torch.randn(2, 6, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
FREQUENCIES = {"feat_dim": 8, "max_length": 6}
IDS = torch.zeros(2, 6, dtype=torch.int32)
LARGEST, SMALLEST = sys.maxsize, -sys.maxsize - 1

BAD = {
    "max_segments": (selfattn.cu_seqlens_from_segment_ids, {"segment_ids": IDS}, (LARGEST, LARGEST - 1, SMALLEST, -1)),
    "length": (selfattn.segment_ids_from_cu_seqlens, {"cu_seqlens": IDS[0]}, (LARGEST, 2**40, SMALLEST, -1)),
    "max_length": (selfattn.precompute_freqs, {"feat_dim": 8}, (LARGEST, 2**40, SMALLEST, -1)),
    "feat_dim": (selfattn.precompute_freqs, {"max_length": 6}, (LARGEST - 1, 2**40, SMALLEST, -1, 0)),
    "theta": (selfattn.precompute_freqs, FREQUENCIES, (0.0, -0.0, 1e-320, 1e-300, 1e-7, float("inf"), float("nan"))),
    "window_left": (selfattn.multihead_attention, {"q": Q, "k": K, "v": V}, (SMALLEST, -2)),
    "window_right": (selfattn.multihead_attention, {"q": Q, "k": K, "v": V}, (SMALLEST, -2)),
    # Positive, and 0 or infinite in float32: no cap at all where it went unnoticed.
    "softcap": (selfattn.multihead_attention, {"q": Q, "k": K, "v": V}, (1e-320, 1e-300, 1e-31, 1e31, 1e300)),
    "qk_scale": (selfattn.multihead_attention, {"q": Q, "k": K, "v": V}, (float("inf"), float("nan"))),
    "eps": (selfattn.qk_norm_rope, {"q": Q, "k": K}, (float("inf"), float("nan"), -1e-320)),
}


@pytest.mark.parametrize("name", BAD)
def test_number_out_of_range_is_named(name: str) -> None:
    function, arguments, values = BAD[name]
    for value in values:
        with pytest.raises(ValueError, match=rf"^selfattn: {name} must "):
            function(**arguments, **{name: value})


@pytest.mark.parametrize("backend", ["flash", "aten", "reference"])
@pytest.mark.parametrize("window", [2**31, 2**40, LARGEST - 1, LARGEST])
@pytest.mark.parametrize(("queries", "keys"), [(6, 9), (9, 6), (6, 6)])
def test_window_beyond_the_row_is_no_window(queries: int, keys: int, window: int, backend: str) -> None:
    q, k, v = torch.randn(2, queries, 4, 8), torch.randn(2, keys, 2, 8), torch.randn(2, keys, 2, 8)
    for causal in (True, False):
        expected = selfattn.multihead_attention(q, k, v, causal=causal, backend=backend)
        for windows in (
            {"window_left": window},
            {"window_right": window},
            {"window_left": window, "window_right": window},
        ):
            actual = selfattn.multihead_attention(q, k, v, causal=causal, backend=backend, **windows)
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["flash", "reference"])
@pytest.mark.parametrize("softcap", [1e-30, 1e-10, 1e10, 1e30])
def test_softcap_at_the_ends_of_its_range_is_applied(softcap: float, backend: str) -> None:
    actual = selfattn.multihead_attention(Q, K, V, softcap=softcap, backend=backend)
    doubles = (tensor.double() for tensor in (Q, K, V))
    expected, _ = reference.attention(*doubles, softcap=softcap)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["flash", "aten", "reference"])
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-320, 1e-300, -1e-300])
def test_scale_that_float32_cannot_hold_acts_as_zero(scale: float, backend: str) -> None:
    actual = selfattn.multihead_attention(Q, K, V, qk_scale=scale, backend=backend)
    torch.testing.assert_close(actual, selfattn.multihead_attention(Q, K, V, qk_scale=0.0, backend="reference"))


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("scale", [1e300, sys.float_info.max])
def test_scale_beyond_float32_takes_the_largest_logit(scale: float, backend: str) -> None:
    q, k = torch.rand(1, 5, 2, 1) + 0.5, torch.rand(1, 7, 2, 1) + 0.5
    v = torch.randn(1, 7, 2, 4)
    actual = selfattn.multihead_attention(q, k, v, causal=False, qk_scale=scale, backend=backend)
    largest = k[0, :, :, 0].argmax(0)
    expected = torch.stack([v[0, largest[head], head] for head in range(2)])
    torch.testing.assert_close(actual, expected.expand(1, 5, 2, 4))


@pytest.mark.parametrize("eps", [1e-320, 1e-300, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_eps_that_float32_cannot_hold_is_not_zero_nor_infinite(dtype: torch.dtype, eps: float) -> None:
    q = torch.zeros(1, 4, 2, 8, dtype=dtype)
    q[0, 0] = 1.0
    q.requires_grad_()
    result, _ = selfattn.qk_norm_rope(q, q, eps=eps, rope=False)
    assert result.isfinite().all()
    torch.testing.assert_close(result[0, 0], torch.full_like(result[0, 0], 0.0 if eps > 1 else 1.0))
    assert not result[0, 1:].any()


def test_frequencies_of_the_least_theta_are_finite() -> None:
    sin, cos = selfattn.precompute_freqs(128, max_length=1000, theta=1e-6)
    assert sin.isfinite().all() and cos.isfinite().all()
    q = torch.randn(1, 1000, 1, 128)
    assert selfattn.apply_rotary_emb(q, q, theta=1e-6)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["flash", "reference"])
@pytest.mark.parametrize("scale", [1e300, -1e300, 1e30])
def test_largest_scale_under_the_least_cap_is_finite(scale: float, backend: str) -> None:
    q, k = Q.clone(), K.clone()
    q[0, 0], k[0, 3] = 0.0, 0.0
    results = selfattn.multihead_attention(q, k, V, qk_scale=scale, softcap=1e-30, backend=backend, causal=False)
    torch.testing.assert_close(results, V.mean(1, keepdim=True).repeat_interleave(2, 2).expand(2, 6, 4, 8))
