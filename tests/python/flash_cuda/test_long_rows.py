"""Documents of a very long row come out as each of them alone, also where a card's shared memory does not hold the runs
of the row (99 KiB a thread block: beyond 177,408 tokens; 163 KiB: beyond 352,256), and ids are compared instead."""

import pytest
import torch
from support.problems import norm_error
from torch import Tensor

import selfattn

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("deterministic")]
MEAN = 700


def results(tensors: list[Tensor], ids: Tensor | None, grad: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = selfattn.multihead_attention(*leaves, ids, backend="flash")
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("length", [177_408, 177_409, 352_257, 524_288])
def test_documents_of_a_long_row_are_as_alone(length: int, dtype: torch.dtype) -> None:
    starts = torch.rand(length) < 1 / MEAN
    starts[0] = True
    ids = (starts.cumsum(0) - 1).to("cuda", dtype)[None]
    *tensors, grad = (torch.randn(1, length, heads, 64, device="cuda").bfloat16() for heads in (2, 1, 1, 2))
    found = results(tensors, ids, grad)
    begins = [*starts.nonzero().flatten().tolist(), length]
    for document in {0, 1, len(begins) // 3, len(begins) // 2, len(begins) - 2}:
        tokens = slice(begins[document], begins[document + 1])
        alone = results([tensor[:, tokens] for tensor in tensors], None, grad[:, tokens])
        for one, other, name in zip(found, alone, ("out", "dq", "dk", "dv"), strict=True):
            assert norm_error(one[:, tokens], other) < 1e-2, (name, tokens)
