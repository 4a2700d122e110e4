"""Promise: `import selfattn` is quick beside `import torch`: it imports itself alone, and starts no CUDA context."""

import os
import subprocess
import sys
from pathlib import Path

import selfattn

PROGRAM = """
import sys, torch
before = set(sys.modules)
import selfattn
print(sorted(name for name in set(sys.modules) - before if name.split(".")[0] != "selfattn"))
print(torch.cuda.is_initialized(), len(set(sys.modules) - before) > 10)
"""


def test_import_brings_nothing_else() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(selfattn.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "False True"]
