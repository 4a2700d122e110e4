"""No call of any operator, however wrong its arguments, ends in anything but a right result or an error that names an
argument: never in a crash, an internal assertion or foreign memory.

``SELFATTN_FUZZ_CALLS`` is the number of calls of each operator, ``SELFATTN_FUZZ_SEED`` what they are drawn from.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import fuzz_operators

import selfattn

CALLS = int(os.environ.get("SELFATTN_FUZZ_CALLS", "150"))
SEED = os.environ.get("SELFATTN_FUZZ_SEED", "0")
PROCESSES = 4  # a process takes some seconds to begin
NAMES = sorted(fuzz_operators.operators())


@pytest.mark.parametrize("names", [NAMES[i::PROCESSES] for i in range(PROCESSES)], ids=" ".join)
def test_no_call_crashes(names: list[str]) -> None:
    command = [sys.executable, fuzz_operators.__file__, str(CALLS), SEED, *names]
    environment = os.environ | {"PYTHONPATH": str(Path(selfattn.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    ending = "\n".join(done.stdout.splitlines()[-2:])
    assert done.returncode == 0, f"exit status {done.returncode} after\n{ending}\n{done.stderr[-3000:]}"
