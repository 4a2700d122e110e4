"""What a program measured from C++ is recorded with where and when."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support import ROOT

PROGRAM = """#!/bin/sh
echo '{"case": "C++, a call", "impl": "selfattn", "host_us": 2.5, "host_us_in_a_row": 1.5}'
echo "repeats $1" >&2
"""


def test_rows_say_where_and_when(tmp_path: Path) -> None:
    program, path = tmp_path / "program", tmp_path / "host_time.jsonl"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    options = ["--tiny", "--program", program, "--commit", "abc1234", "--out", path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, ROOT / "benchmarks" / "host_time.py", *options]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert "repeats 1" in said.stderr
    (row,) = (json.loads(line) for line in path.read_text().splitlines())
    assert row["case"] == "C++, a call" and row["host_us"] == 2.5 and row["host_us_in_a_row"] == 1.5
    assert row["commit"] == "abc1234" and row["date"] and row["device"]
