"""What stands in one document leaves the results of every other as they are, bit by bit."""

import pytest
import torch
from cases import BACKENDS_ON_CPU, make_ids

import selfattn


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
@pytest.mark.parametrize("kind", ["packed", "shuffled", "reused", "mixed_padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_a_document_moves_itself_alone(backend: str, kind: str, dtype: torch.dtype) -> None:
    length = 90
    q, k, v = (torch.randn(2, length, heads, 16).to(dtype) for heads in (4, 2, 2))
    ids = make_ids(kind, 2, length)
    grad_out = torch.randn(2, length, 4, 16).to(dtype)

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = selfattn.multihead_attention(*leaves, ids, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    try:
        before = run(q, k, v)
    except NotImplementedError:
        pytest.skip(f"{backend} cannot serve this call here")
    for number in ids[ids >= 0].unique().tolist():
        document = ids == number
        changed = [torch.where(document[..., None, None], 5 * torch.randn_like(t), t) for t in (q, k, v)]
        for new, old in zip(run(*changed), before, strict=True):
            assert torch.equal(new[~document], old[~document])
            assert not torch.equal(new[document], old[document])
