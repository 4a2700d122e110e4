"""The CUDA flash backward where it writes: over its own inputs, and sums of dQ that only some rows of a batch need."""

import pytest
import torch
from support.memory import peak_of
from support.problems import make_ids, norm_error

import selfattn  # noqa: F401

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["packed", "shuffled", None])
@pytest.mark.parametrize("dim", [63, 64, 99, 100, 128, 250, 256])
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_gradient_of_the_attention_over_its_inputs_is_the_same(kind, dim: int, is_deterministic: bool) -> None:
    """Short rows and long ones: both forms of the backward pass."""
    torch.use_deterministic_algorithms(is_deterministic)
    for batch, length in ((3, 300), (2, 6000)):
        q, k, v, grad = (torch.randn(batch, length, 4, dim, device="cuda").bfloat16() for _ in range(4))
        ids = None if kind is None else make_ids(kind, batch, length).cuda()
        if kind == "packed" and length > 5000:
            ids = torch.zeros_like(ids)  # one document: the fused form
        out, lse = torch.ops.selfattn.flash_attention(q, k, v, ids)
        wanted = torch.ops.selfattn.flash_attention_backward(grad, None, q, k, v, out, lse, ids)
        dq, dk, dv = out.clone(), k.clone(), v.clone()
        call = torch.ops.selfattn.flash_attention_backward.into
        call(grad, None, q, dk, dv, dq, lse, ids, dq=dq, dk=dk, dv=dv)
        for found, expected, name in zip((dq, dk, dv), wanted, ("dq", "dk", "dv"), strict=True):
            if is_deterministic or name != "dq":
                assert torch.equal(found, expected), (name, batch, length)
            else:  # float32 additions in any order
                assert norm_error(found, expected) < 1e-3, (name, batch, length)


@pytest.mark.parametrize("kind", ["one_document", "shuffled"])
@pytest.mark.parametrize("dim", [64, 128])
def test_long_documents_of_many_batches_are_as_alone(kind: str, dim: int) -> None:
    """The fused form takes a few batches at a time, with one memory for the sum of dQ."""
    batch, length, heads = 8, 6000, 4  # 188 tiles of keys a batch, of 1024 a launch
    q, k, v, grad = (torch.randn(batch, length, heads, dim, device="cuda").bfloat16() for _ in range(4))
    grad_lse = torch.randn(batch, heads, length, device="cuda")
    ids = make_ids(kind, batch, length).cuda()
    out, lse = torch.ops.selfattn.flash_attention(q, k, v, ids)
    inputs = (grad, grad_lse, q, k, v, out, lse, ids)
    found = torch.ops.selfattn.flash_attention_backward(*inputs)
    for row in range(batch):
        alone = torch.ops.selfattn.flash_attention_backward(*(t[row : row + 1] for t in inputs))
        for gradient, expected, name in zip(found, alone, ("dq", "dk", "dv"), strict=True):
            assert norm_error(gradient[row], expected[0]) < 1e-3, (name, row)


def test_sum_of_dq_is_kept_small_where_it_may_not_be_needed() -> None:
    batch, length, heads, dim = 4, 4096, 32, 128  # 1024 tiles of keys a batch: one a launch
    q, k, v, grad = (torch.randn(batch, length, heads, dim, device="cuda").bfloat16() for _ in range(4))
    ids = torch.arange(length, device="cuda").div(256, rounding_mode="floor").int().expand(batch, length).contiguous()
    out, lse = torch.ops.selfattn.flash_attention(q, k, v, ids)
    peak = peak_of(lambda: torch.ops.selfattn.flash_attention_backward(grad, None, q, k, v, out, lse, ids))
    tensor = 2 * q.numel()
    assert peak <= 3 * tensor + 2 * tensor // batch + tensor // 8  # dq, dk, dv; float32 of one batch; statistics


@pytest.mark.parametrize("what", ["huge_logits", "nan_in_k", "nan_in_v", "nan_in_grad"])
@pytest.mark.parametrize("kind", ["packed", "shuffled", None])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gradients_of_tiles_that_are_computed_twice_go_over_the_inputs_too(kind, dim: int, what: str) -> None:
    """What is read again must not have been written over: rows of huge logits, and of others' NaN."""
    torch.use_deterministic_algorithms(True)
    for batch, length in ((2, 300), (1, 6000)):
        q, k, v, grad = (torch.randn(batch, length, 4, dim, device="cuda").bfloat16() for _ in range(4))
        ids = None if kind is None else make_ids(kind, batch, length).cuda()
        if what == "huge_logits":
            q *= 3600
        else:
            {"nan_in_k": k, "nan_in_v": v, "nan_in_grad": grad}[what][:, length // 2] = float("nan")
        out, lse = torch.ops.selfattn.flash_attention(q, k, v, ids)
        wanted = torch.ops.selfattn.flash_attention_backward(grad, None, q, k, v, out, lse, ids)
        dq, dk, dv = out.clone(), k.clone(), v.clone()
        torch.ops.selfattn.flash_attention_backward.into(grad, None, q, dk, dv, dq, lse, ids, dq=dq, dk=dk, dv=dv)
        for found, expected, name in zip((dq, dk, dv), wanted, ("dq", "dk", "dv"), strict=True):
            assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)), (name, batch, length)
