"""On any pattern of ids, every backend attends to equal ids alone, and says nothing that is not a number."""

import reference
import torch
from cases import BACKENDS_ON_CPU, error, segment_ids
from hypothesis import given
from hypothesis import strategies as st

import selfattn


def attend(q, k, v, ids, backend, **options) -> torch.Tensor | None:
    try:
        return selfattn.multihead_attention(q, k, v, ids, backend=backend, **options)
    except NotImplementedError:
        return None


@given(
    segment_ids(),
    st.booleans(),
    st.integers(-1, 4),
    st.integers(-1, 4),
    st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    st.integers(0, 2**32 - 1),
)
def test_output_and_gradients_equal_the_oracle(
    ids: torch.Tensor, causal: bool, window_left: int, window_right: int, heads: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, length = ids.shape
    q, k, v = (
        torch.randn(batch, length, n, 8, generator=generator, requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    )
    options = {"causal": causal, "window_left": window_left, "window_right": window_right}
    expected, _ = reference.attention(q, k, v, ids, **options)
    grad_out = torch.randn(expected.shape, generator=generator)
    expected_gradients = reference.gradients(expected, (q, k, v), grad_out)
    served = 0
    for backend in BACKENDS_ON_CPU:
        out = attend(q, k, v, ids, backend, **options)
        if out is None:
            continue
        served += 1
        assert error(out, expected) < 5e-6, backend
        for actual, oracle in zip(torch.autograd.grad(out, (q, k, v), grad_out), expected_gradients, strict=True):
            assert error(actual, oracle) < 2e-5, backend
    assert served >= 3  # reference, aten and auto at least


@given(segment_ids(), st.integers(0, 2**32 - 1))
def test_names_of_the_ids_do_not_matter(ids: torch.Tensor, seed: int) -> None:
    """Any one-to-one renaming of the ids, and of padding to other negative numbers, gives the same bits."""
    q = torch.randn(*ids.shape, 2, 8, generator=torch.Generator().manual_seed(seed))
    values = ids.unique()
    renamed = torch.full_like(ids, -1)
    for new, old in enumerate(reversed(values.tolist())):
        renamed[ids == old] = 3 * new if old >= 0 else -5 - new
    for backend in BACKENDS_ON_CPU:
        out = attend(q, q, q, ids, backend)
        if out is not None:
            assert torch.equal(out, attend(q, q, q, renamed, backend))


@given(segment_ids(), st.integers(0, 2**32 - 1))
def test_ids_and_their_copy_for_the_keys_are_the_same_call(ids: torch.Tensor, seed: int) -> None:
    q = torch.randn(*ids.shape, 2, 8, generator=torch.Generator().manual_seed(seed))
    for backend in BACKENDS_ON_CPU:
        out = attend(q, q, q, ids, backend)
        if out is not None:
            assert torch.equal(out, attend(q, q, q, ids, backend, kv_segment_ids=ids.clone()))
