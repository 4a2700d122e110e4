"""A CUDA graph of a whole training step of the module reads new inputs, ids included, at every replay."""

import pytest
import torch
from support.problems import error, make_ids
from torch import Tensor

from selfattn import SelfAttention, SelfAttentionConfig, precompute_freqs

pytestmark = pytest.mark.gpu

E, BATCH, LENGTH = 256, 2, 300
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""The graph may run other matrix products than eager mode, and parts of a sum may come in another order."""


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "num_kv_heads": 2, "use_bias": True, "sinks": True}])
@pytest.mark.parametrize("has_freqs", [False, True])
def test_replay_equals_eager_with_other_ids(dtype: torch.dtype, options: dict, has_freqs: bool) -> None:
    module = SelfAttention(E, SelfAttentionConfig(head_dim=64, **options), device="cuda", dtype=dtype)
    torch.nn.init.normal_(module.out_proj.weight, std=E**-0.5)  # so that no gradient is small
    x = torch.randn(BATCH, LENGTH, E, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(BATCH, LENGTH, E, device="cuda", dtype=dtype)
    ids = make_ids("packed", BATCH, LENGTH).cuda()
    positions = torch.randint(0, 1000, (BATCH, LENGTH), device="cuda")
    freqs = precompute_freqs(64, positions) if has_freqs else None
    leaves = [x, *module.parameters()]

    def step() -> list[Tensor]:
        out = module(x, freqs, ids)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = step()

    previous = None
    for kind in ("packed", "one_document", "shuffled", "mixed_padding", "distinct", "all_padding"):
        ids.copy_(make_ids(kind, BATCH, LENGTH))
        with torch.no_grad():
            x.normal_()
            grad.normal_()
        graph.replay()
        torch.cuda.synchronize()
        for actual, expected in zip(captured, step(), strict=True):
            assert error(actual, expected) < TOLERANCE[dtype], kind
        assert previous is None or not torch.equal(captured[0], previous)
        previous = captured[0].detach().clone()
