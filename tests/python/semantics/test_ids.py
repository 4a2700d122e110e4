"""On any pattern of ids, every backend attends to equal ids alone, and says nothing that is not a number."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.cases import BACKENDS_ON_CPU, PLACES, segment_ids
from support.problems import dense_attention, error, make_ids, names
from support.serving_table import describe, is_refused
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import selfattn

OPS = torch.ops.selfattn


def attend(q, k, v, ids, backend, **options) -> torch.Tensor:
    return selfattn.multihead_attention(q, k, v, ids, backend=backend, **options)


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
    for backend in BACKENDS_ON_CPU:
        out = attend(q, k, v, ids, backend, **options)
        assert error(out, expected) < 5e-6, backend
        for actual, oracle in zip(torch.autograd.grad(out, (q, k, v), grad_out), expected_gradients, strict=True):
            assert error(actual, oracle) < 2e-5, backend


@given(segment_ids(), st.integers(0, 2**32 - 1))
def test_names_of_the_ids_do_not_matter(ids: torch.Tensor, seed: int) -> None:
    """Any one-to-one renaming of the ids, and of padding to other negative numbers, gives the same bits."""
    q = torch.randn(*ids.shape, 2, 8, generator=torch.Generator().manual_seed(seed))
    values = ids.unique()
    renamed = torch.full_like(ids, -1)
    for new, old in enumerate(reversed(values.tolist())):
        renamed[ids == old] = 3 * new if old >= 0 else -5 - new
    for backend in BACKENDS_ON_CPU:
        assert torch.equal(attend(q, q, q, ids, backend), attend(q, q, q, renamed, backend))


@given(segment_ids(), st.integers(0, 2**32 - 1))
def test_ids_and_their_copy_for_the_keys_are_the_same_call(ids: torch.Tensor, seed: int) -> None:
    q = torch.randn(*ids.shape, 2, 8, generator=torch.Generator().manual_seed(seed))
    for backend in BACKENDS_ON_CPU:
        copied = attend(q, q, q, ids, backend, kv_segment_ids=ids.clone())
        assert torch.equal(attend(q, q, q, ids, backend), copied)


TYPES = (torch.int32, torch.int64)


@pytest.mark.parametrize("kv_type", [None, *TYPES])
@pytest.mark.parametrize("id_type", TYPES)
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_integer_types_of_the_ids_do_not_matter(
    device: str, backend: str, id_type: torch.dtype, kv_type: torch.dtype | None
) -> None:
    q = torch.randn(2, 13, 2, 8, device=device, dtype=torch.bfloat16)
    ids = make_ids("mixed_padding", 2, 13).to(device)
    kv_ids = None if kv_type is None else make_ids("mixed_padding", 2, 13).to(device)
    if is_refused(backend, describe(q, q, q, ids), lambda: attend(q, q, q, ids, backend)):
        return
    expected = attend(q, q, q, ids, backend, kv_segment_ids=kv_ids)
    others = {"kv_segment_ids": None if kv_ids is None else kv_ids.to(kv_type)}
    assert torch.equal(attend(q, q, q, ids.to(id_type), backend, **others), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [29, 500])
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_documents_of_the_keys_may_stand_in_another_order(device: str, backend: str, length: int, causal: bool) -> None:
    q, k, v = (torch.randn(2, length, 2, 8, device=device, dtype=torch.bfloat16) for _ in range(3))
    documents = torch.arange(length) * 7 // length
    order = torch.cat([torch.where(documents == document)[0] for document in (4, 1, 6, 0, 5, 2)])
    ids, kv_ids = (names(each).int().expand(2, -1).contiguous().to(device) for each in (documents, documents[order]))
    k, v = k[:, order], v[:, order]
    options = {"kv_segment_ids": kv_ids, "causal": causal}
    if is_refused(backend, describe(q, k, v, ids, **options), lambda: attend(q, k, v, ids, backend, **options)):
        return
    expected = dense_attention(q.double(), k.double(), v.double(), segment_ids=ids, **options)["out"]
    assert error(attend(q, k, v, ids, backend, **options), expected) < 1.6e-2


KERNELS: dict[str, Callable] = {
    "flash_attention": lambda q, ids, **kv: OPS.flash_attention(q, q, q, ids, **kv),
    "flash_attention_backward": lambda q, ids, **kv: OPS.flash_attention_backward(
        q, None, q, q, q, q, q.new_zeros(2, 4, 13, dtype=torch.float32), ids, **kv
    ),
    "qk_norm_rope_attention": lambda q, ids: OPS.qk_norm_rope_attention(q, q, q, segment_ids=ids),
}
MASKS: dict[str, Callable] = {
    backend: lambda q, ids, backend=backend, **kv: selfattn.multihead_attention(q, q, q, ids, backend=backend, **kv)
    for backend in ("reference", "aten")
}
PAIRS = [(), *((kv_type,) for kv_type in TYPES)]


@pytest.mark.parametrize(
    ("name", "types"),
    [
        (name, (id_type, *kv_types))
        for name in (*KERNELS, *MASKS)
        for id_type in TYPES
        for kv_types in (PAIRS if name != "qk_norm_rope_attention" else PAIRS[:1])
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_int64_ids_are_narrowed_once_and_not_for_cuda_kernels(
    name: str, types: tuple[torch.dtype, ...], device: str
) -> None:
    """In the graph of a call on fake tensors, which need no GPU. CUDA's kernels read both ids in one type."""
    with FakeTensorMode():
        q = torch.zeros(2, 13, 4, 8, device=device, dtype=torch.bfloat16)
        ids = [torch.zeros(2, 13, device=device, dtype=t) for t in types]
        graph = make_fx(
            lambda q, ids, *kv: (KERNELS | MASKS)[name](q, ids, **({"kv_segment_ids": kv[0]} if kv else {}))
        )(q, *ids).graph
    narrowed = [node.target for node in graph.nodes].count(torch.ops.aten._assert_async.msg)
    is_read_as_given = device == "cuda" and name in KERNELS and len(set(types)) == 1
    assert narrowed == (0 if is_read_as_given else types.count(torch.int64))
