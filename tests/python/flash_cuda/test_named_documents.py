"""Documents whose ids are names in no order give the bits of documents that are numbered from left to right: to the
kernels both are runs. Where an id comes back, or there are more runs than are looked at, ids are compared."""

import pytest
import torch
from support.problems import Case, error, names
from torch import Tensor

import selfattn

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("deterministic")]


def documents(batch: int, length: int, mean: int, padding: bool) -> Tensor:
    """Numbers of documents, from left to right in all rows together; some padding between them."""
    starts = torch.rand(batch, length) < 1 / mean
    starts[:, 0] = True
    ids = starts.flatten().cumsum(0).view(batch, length)
    if padding:
        ids[(ids % 5 == 0)] = -1
        ids[:, length - length // 9 :] = -1
    return ids


def results(ids: Tensor, dtype: torch.dtype = torch.int32, head_dim: int = 64) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    heads = [
        torch.randn(*ids.shape, n, head_dim, device="cuda", generator=generator).bfloat16().requires_grad_()
        for n in (2, 1, 1)
    ]
    out = selfattn.multihead_attention(*heads, ids.to("cuda", dtype), backend="flash")
    return [out, *torch.autograd.grad(out, heads, out.detach().roll(1, -1))]


def named(ids: Tensor) -> Tensor:
    return torch.where(ids < 0, ids, names(ids))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(
    ("length", "mean"), [(1, 1), (31, 12), (33, 12), (500, 30), (4096, 64), (5000, 24), (16384, 700), (70000, 300)]
)
def test_bits_are_those_of_numbered_documents(length: int, mean: int, padding: bool, dtype: torch.dtype) -> None:
    ids = documents(2, length, mean, padding)
    for one, other in zip(results(named(ids), dtype), results(ids, dtype), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rows_of_both_kinds(head_dim: int) -> None:
    """One row of documents in order, one of names, one in which an id comes back."""
    ids = documents(3, 900, 40, padding=True)
    mixed = torch.stack([ids[0], named(ids[1]), ids[2]])
    mixed[2, 800:] = mixed[2, 0]
    numbered = torch.stack([ids[0], ids[1], mixed[2]])
    for one, other in zip(results(mixed, head_dim=head_dim), results(numbered, head_dim=head_dim), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("place", [0, 1, 33, 2000, 4095])
def test_an_id_that_comes_back_is_the_same_document(place: int) -> None:
    ids = named(documents(1, 4096, 64, padding=False))
    ids[0, place] = ids[0, (place + 2048) % 4096]
    check_against_the_formula(ids)


@pytest.mark.parametrize("length", [250, 4096])
@pytest.mark.parametrize("mean", [1, 3, 10, 11, 12])
def test_documents_too_short_for_the_search(length: int, mean: int) -> None:
    """About as many runs as it looks at, fewer and more."""
    check_against_the_formula(named(torch.arange(length)[None] // mean))


def check_against_the_formula(ids: Tensor) -> None:
    case = Case("named", batch=1, num_queries=ids.shape[1], num_heads=2, num_kv_heads=1, dim=64, ids=None)
    tensors = case.tensors(torch.bfloat16, "cuda")
    out = selfattn.multihead_attention(**tensors, segment_ids=ids.int().cuda(), backend="flash")
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    expected = selfattn.multihead_attention(**wide, segment_ids=ids.int().cuda(), backend="reference")
    assert error(out, expected) < 1.6e-2
