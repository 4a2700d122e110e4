"""The CPU kernels need memory in proportion to the tokens, not to the pairs."""

import subprocess
import sys

from support import ROOT

LENGTH = 32 * 1024
MOST_MIB = 128  # the pairs of one head alone would take LENGTH**2 bytes = 1024 MiB as a boolean mask

SCRIPT = f"""
import resource
import torch
import selfattn

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def run(length):
    q, k, v = (torch.randn(1, length, 1, 64).bfloat16().requires_grad_() for _ in range(3))
    ids = (torch.arange(length) // 1000)[None]
    out, lse = torch.ops.selfattn.flash_attention(q, k, v, ids)
    out.sum().backward()

run(64)
before = peak_mib()
run({LENGTH})
print(peak_mib() - before)
"""


def test_memory_of_long_rows_is_linear() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(run.stdout) < MOST_MIB
