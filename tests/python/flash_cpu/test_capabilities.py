"""The CPU kernels of every instruction set that this machine can run give the results."""

import os
import subprocess
import sys

import pytest
import torch
from support import ROOT

ORDER = ["DEFAULT", "AVX2", "AVX512"]  # ATen's names, each able to run those before it


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_kernels_of_a_capability(capability: str) -> None:
    own = torch.backends.cpu.get_cpu_capability()
    if own not in ORDER or ORDER.index(own) < ORDER.index(capability.upper()):
        pytest.skip(f"this CPU's capability is {own}")
    if own == capability.upper():
        pytest.skip("what these tests run without this one")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    names = ["formula", "extreme_numbers", "huge_logits", "infinities", "isolation"]
    files = [f"flash_cpu/test_{name}.py" for name in names]
    files += ["kv_cache/test_flash_cpu.py"]
    files += ["qk_norm_rope/test_forward.py", "qk_norm_rope/test_gradients.py"]
    wanted = ["-k", "not threads and not bitwise and (flash_cpu or equal_float64)"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *wanted]
    run = subprocess.run(command, cwd=ROOT / "tests" / "python", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
