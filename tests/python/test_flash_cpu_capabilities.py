"""The CPU kernels of every instruction set that this machine can run give the results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
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
    names = ["", "_extreme_numbers", "_huge_logits", "_infinities", "_isolation"]
    files = [f"test_flash_cpu{name}.py" for name in names]
    files += ["test_qk_norm_rope_forward.py", "test_qk_norm_rope_gradients.py"]
    wanted = ["-k", "not threads and not bitwise and (test_flash_cpu or equal_float64)"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *wanted]
    run = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
