"""What PyTorch's CUDA kernels cannot take as it is reaches them in another form, so that no valid call fails below."""

import pytest
import torch
from support.cases import PLACES
from support.problems import error, make_ids
from support.serving_table import describe, skip_refused

import selfattn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("has_ids", [True, False])
@pytest.mark.parametrize("dim", [1, 16])
@pytest.mark.parametrize("apart", ["q", "k", "v"])
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_last_dimension_may_lie_apart(
    device: str, backend: str, apart: str, dim: int, has_ids: bool, dtype: torch.dtype
) -> None:
    tensors = {name: torch.randn(2, 12, 4, dim, device=device).to(dtype) for name in ("q", "k", "v")}
    if dim == 1:
        strided = torch.empty(2, 12, 4, 3, device=device, dtype=dtype).as_strided((2, 12, 4, 1), (144, 12, 3, 7))
    else:
        strided = torch.empty(2, 12, dim, 4, device=device, dtype=dtype).transpose(2, 3)
    views = {**tensors, apart: strided.copy_(tensors[apart])}
    ids = make_ids("shuffled", 2, 12).to(device) if has_ids else None
    grad_out = torch.randn(2, 12, 4, dim, device=device).to(dtype)

    def run(inputs: dict) -> list[torch.Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs.values()]
        out = selfattn.multihead_attention(*leaves, ids, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, grad_out)]

    assert views[apart].stride(-1) != 1
    try:
        expected = run(tensors)
    except NotImplementedError as refusal:
        skip_refused(refusal, backend, describe(*tensors.values(), ids))
    for actual, oracle in zip(run(views), expected, strict=True):
        assert error(actual, oracle) < (2e-6 if dtype == torch.float32 else 1.6e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["aten", "auto"])
@pytest.mark.parametrize("has_ids", [True, False])
@pytest.mark.parametrize(("batch", "heads"), [(1, 70_000), (70_000, 1)])
def test_more_heads_than_a_launch_grid_holds(
    batch: int, heads: int, has_ids: bool, backend: str, dtype: torch.dtype
) -> None:
    q, k, v = (torch.randn(batch, 5, heads, 8, device="cuda").to(dtype).requires_grad_() for _ in range(3))
    ids = torch.tensor([[0, 1, 0, -1, 1]], device="cuda").expand(batch, 5) if has_ids else None
    grad_out = torch.randn_like(q)

    def run(backend: str, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        out = selfattn.multihead_attention(*leaves, ids, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]

    expected = run("reference", [leaf.detach().double().requires_grad_() for leaf in (q, k, v)])
    for actual, oracle in zip(run(backend, [q, k, v]), expected, strict=True):
        assert error(actual, oracle) < (2e-5 if dtype == torch.float32 else 4e-2)
