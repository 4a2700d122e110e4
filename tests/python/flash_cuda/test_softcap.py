"""CUDA flash with softcap at its extremes: caps and logits of every size, no cap at all, memory, repeatability. What it
does beside masks, ids, windows and sinks is among the other tests of these kernels."""

import math

import pytest
import torch
from support.cases import CudaCase, long
from support.memory import peak_of
from support.problems import dense_attention, norm_error

import selfattn

pytestmark = pytest.mark.gpu

DIMS = (64, 128, 256)
TANH_ERROR = 1e-6
"""Of itself (csrc/cuda/flash/tile/softcap.cuh)."""


def run(problem: CudaCase) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The call, and out, lse, dq, dk and dv of the operators."""
    tensors, grads = problem.tensors(device="cuda"), problem.grads(device="cuda")
    call = {**tensors, **problem.options}
    out, lse = torch.ops.selfattn.flash_attention(**call)
    gradients = torch.ops.selfattn.flash_attention_backward(grads["grad_out"], None, out=out, lse=lse, **call)
    return call | grads, {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def assert_as_good(problem: CudaCase) -> None:
    """Every result's error is that of the formula in the same precision; the floor counts where it is exact, or all
    weights of a row are nearly the same, so that one rounding of them, up or down, is everybody's."""
    call, results = run(problem)
    exact = dense_attention(**call)
    peers = dense_attention(**call, precision=torch.float32, rounding=problem.dtype)
    for name, mine in results.items():
        assert mine.isfinite().all(), name
        error, allowance = (
            (tensor.double() - exact[name]).square().mean().sqrt().item() for tensor in (mine, peers[name])
        )
        largest = exact["lse"].abs().max().item()
        of_weights = torch.finfo(problem.dtype).eps / 4 + 2 * TANH_ERROR * min(largest, problem.softcap)
        floor = TANH_ERROR * largest
        if name != "lse":
            floor = 1e-5 + of_weights * exact[name].square().mean().sqrt().item()
            if problem.dtype == torch.float16:  # dS is rounded among float16's smallest numbers
                floor += 2**-25 * math.sqrt(problem.num_queries) * problem.spread
        assert error <= 2 * allowance + floor, f"{name}: error {error:.2e}, same-precision formula {allowance:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0, 200.0])
@pytest.mark.parametrize("softcap", [1e-3, 1.0, 30.0, 500.0, 1e3, 1e4, 1e6, 1e9])
@pytest.mark.parametrize("dim", DIMS)
def test_logits_of_every_size(dim: int, softcap: float, spread: float, dtype: torch.dtype) -> None:
    assert_as_good(CudaCase(dim=dim, softcap=softcap, spread=spread, dtype=dtype))


@pytest.mark.parametrize("spread", [3.0, 20.0])
@pytest.mark.parametrize("softcap", [1e-3, 30.0, 500.0, 1e4])
@pytest.mark.parametrize("dim", DIMS)
def test_logits_of_every_size_in_long_rows(dim: int, softcap: float, spread: float) -> None:
    assert_as_good(long(2600, dim=dim, softcap=softcap, spread=spread, causal=False))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("make", [CudaCase, long], ids=["short", "long"])
def test_a_few_large_scores_among_small_ones(make, dim: int) -> None:
    """Some warps meet scores beyond those that the fast way is for, some do not, and most see a few."""
    problem = make(dim=dim, softcap=30.0, spread=1.0)
    tensors, grads = problem.tensors(device="cuda"), problem.grads(device="cuda")
    tensors["q"][:, 5::97] *= 40
    call = {**tensors, **problem.options}
    out, lse = torch.ops.selfattn.flash_attention(**call)
    gradients = torch.ops.selfattn.flash_attention_backward(grads["grad_out"], None, out=out, lse=lse, **call)
    exact = dense_attention(**call, **grads)
    peers = dense_attention(**call, **grads, precision=torch.float32, rounding=problem.dtype)
    for name, mine in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True):
        assert norm_error(mine, exact[name]) <= 2 * norm_error(peers[name], exact[name]), name


@pytest.mark.parametrize("softcap", [2.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ids", ["padding_around", "shuffled_padding"])
@pytest.mark.parametrize("dim", DIMS)
def test_large_scores_of_another_document_change_no_bit(dim: int, ids: str, dtype: torch.dtype, softcap: float) -> None:
    """A warp that meets a large score, allowed or not, goes another way with all of its scores."""
    problem = CudaCase(dim=dim, ids=ids, dtype=dtype, softcap=softcap, spread=1.0)
    tensors = problem.tensors(device="cuda")
    segment_ids = tensors["segment_ids"]
    others = segment_ids == segment_ids[segment_ids >= 0].min()
    out, lse = torch.ops.selfattn.flash_attention(**tensors, **problem.options)
    keys = tensors["k"].clone()
    keys[others] *= min(3 * softcap, 5e3)
    changed_out, changed_lse = torch.ops.selfattn.flash_attention(**tensors | {"k": keys}, **problem.options)
    assert torch.equal(changed_out[~others], out[~others])
    assert torch.equal(changed_lse.transpose(1, 2)[~others], lse.transpose(1, 2)[~others])
    assert not torch.equal(changed_out[others], out[others])


@pytest.mark.parametrize("dim", DIMS)
def test_a_cap_beyond_all_logits_is_as_none(dim: int) -> None:
    for problem in (CudaCase(dim=dim), long(dim=dim)):
        torch.manual_seed(0)
        _, plain = run(problem)
        for softcap in (1e6, 1e12, 1e30):
            torch.manual_seed(0)
            _, capped = run(problem.with_(softcap=softcap))
            assert (capped["lse"] - plain["lse"]).abs().max() < 1e-5
            for name in ("out", "dq", "dk", "dv"):
                assert norm_error(capped[name], plain[name]) < 5e-3, (name, softcap)


@pytest.mark.parametrize("dim", DIMS)
def test_a_cap_of_nearly_nothing_gives_the_mean(dim: int) -> None:
    for problem in (CudaCase(dim=dim, softcap=1e-30), long(dim=dim, softcap=1e-30)):
        call, results = run(problem)
        counts = torch.arange(1, problem.num_queries + 1, device="cuda").view(1, -1, 1, 1)
        values = call["v"].double().repeat_interleave(problem.num_heads // problem.num_kv_heads, 2)
        torch.testing.assert_close(results["out"].double(), values.cumsum(1) / counts, rtol=1e-2, atol=1e-2)
        assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("dim", DIMS)
def test_forward_repeats_bitwise(dim: int) -> None:
    tensors = long(dim=dim, num_heads=8, num_kv_heads=2, spread=4.0).tensors(device="cuda")
    first = torch.ops.selfattn.flash_attention(**tensors, softcap=30.0)
    for _ in range(4):
        again = torch.ops.selfattn.flash_attention(**tensors, softcap=30.0)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("kind", [None, "long_documents", "shuffled_padding"])
def test_memory_grows_with_the_tokens_alone(kind: str | None) -> None:
    problem = long(16384, ids=kind, num_heads=4, num_kv_heads=4, softcap=30.0)
    call = {**problem.tensors(device="cuda"), **problem.options}
    leaves = {name: call[name].requires_grad_() for name in ("q", "k", "v")}
    grad = problem.grads(device="cuda")["grad_out"]

    def step() -> None:
        torch.autograd.grad(selfattn.multihead_attention(**call), list(leaves.values()), grad)

    # out, lse, three gradients, dQ in float32 and statistics; a mask alone would be 268 MB.
    assert peak_of(step) <= 10 * 2 * call["q"].numel()
