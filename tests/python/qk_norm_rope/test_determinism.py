"""qk_norm_rope and its gradient repeat bitwise, whoever works on them, and can be captured in a CUDA graph."""

import pytest
import torch
from support.norm_rope import NormRopeCase
from torch import Tensor

import selfattn

CASES = [
    NormRopeCase(dtype=torch.bfloat16, dim=128, heads=16, kv_heads=4, length=700),
    NormRopeCase(dim=64, heads=5, kv_heads=5, length=300, pairing="half", source="positions_of_rows"),
    NormRopeCase(dim=24, heads=5, kv_heads=1, length=300, source="tables"),
]


def run(arguments: dict) -> list[Tensor]:
    names = [name for name in ("q", "k", "q_weight", "k_weight") if name in arguments]
    leaves = [arguments[name].detach().requires_grad_() for name in names]
    results = selfattn.qk_norm_rope(**(arguments | dict(zip(names, leaves, strict=True))))
    return [*results, *torch.autograd.grad(results, leaves, [result.detach() for result in results])]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_repeats_are_bitwise_equal(case: NormRopeCase, device: str) -> None:
    arguments, _ = case.make(device)
    first = run(arguments)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(arguments), first, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_change_nothing(case: NormRopeCase) -> None:
    arguments, _ = case.make()
    torch.set_num_threads(1)
    one = run(arguments)
    torch.set_num_threads(3)
    three = run(arguments)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_graph_replays_with_other_values(case: NormRopeCase) -> None:
    arguments, _ = case.make("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(arguments)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(arguments)
    for name in ("q", "k", "q_weight"):
        arguments[name].copy_(torch.randn_like(arguments[name]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(arguments), strict=True))


@pytest.mark.gpu
def test_another_stream_gives_the_same() -> None:
    arguments, _ = CASES[0].make("cuda")
    first = run(arguments)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        again = run(arguments)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
