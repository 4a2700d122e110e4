"""Writes torchscript_<version>.pt: calls of the operators as a script, with their arguments and results, saved by the
library of that version. Later libraries must load it and give the same (tests/python/doors/test_torchscript.py).

    SELFATTN_LIBRARY=<the library of that version> python tests/data/make_torchscript.py <version>

The files stay as they were written: this program is for those of later versions.
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

torch.ops.load_library(os.environ["SELFATTN_LIBRARY"])


class Calls(torch.nn.Module):
    """forward() gives the results; those of the version that wrote the file are ``expected_0``, ``expected_1`` ..."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, heads in (("q", 4), ("k", 2), ("v", 2)):
            self.register_buffer(name, torch.randn(1, 7, heads, 8))
        self.register_buffer("ids", torch.tensor([[0, 1, 0, 1, 1, -1, 0]], dtype=torch.int32))
        self.register_buffer("sinks", torch.randn(4))
        self.register_buffer("x", torch.randn(1, 7, 16))
        self.register_buffer("weight", torch.randn(16, 16) / 4)

    def forward(self) -> list[Tensor]:
        q, k, v, ids = self.q, self.k, self.v, self.ids
        ops = torch.ops.selfattn
        results = [ops.multihead_attention(q, k, v), ops.multihead_attention(q, k, v, ids, False, 0.3, "reference")]
        results.append(
            ops.multihead_attention(
                q,
                k,
                v,
                ids,
                backend="flash",
                kv_segment_ids=ids,
                window_left=3,
                window_right=1,
                softcap=2.0,
                sinks=self.sinks,
            )
        )
        results += list(ops.multihead_attention_lse(q[:, 4:], k, v, window_left=3))
        out, lse = ops.flash_attention(q, k, v, ids, window_left=3, sinks=self.sinks)
        results += [out, lse]
        results += list(ops.flash_attention_backward(out, lse, q, k, v, out, lse, ids, window_left=3))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        ops.flash_attention_backward(out, None, q, k, v, out, lse, ids, softcap=0.0, dq=dq, dk=dk, dv=dv)
        results += [dq, dk, dv]
        w = self.weight
        results.append(ops.self_attention(self.x, w, w, w, w, segment_ids=ids, head_dim=8, window_left=2))
        return results


if __name__ == "__main__":
    calls = Calls()
    for index, expected in enumerate(calls()):
        calls.register_buffer(f"expected_{index}", expected)
    torch.jit.script(calls).save(str(Path(__file__).parent / f"torchscript_{sys.argv[1]}.pt"))
