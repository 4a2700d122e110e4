"""The benchmark of a stack of layers that decodes compares what it times, and its rows name it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support import ROOT


def test_rows_name_what_they_measured(tmp_path: Path) -> None:
    path = tmp_path / "decode.jsonl"
    compared = ["selfattn", "selfattn_pages", "static_math", "static_repeat", "filled_flash2"]
    chosen = [part for name in compared for part in ("--impl", name)]
    quick = ["--tiny", "--rounds", "1", "--steps", "1", "--repeats", "1", "--out", str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, ROOT / "benchmarks" / "decode_stack.py", *chosen, *quick]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["impl"] for row in rows] == ["copy", *compared], rows  # one that differs from ours has no time
    for row in rows:
        assert row["ms"] > 0 and row["share"] > 0 and row["mb"] > 0
        assert row["commit"] and row["date"] and row["device"]
        assert row["impl"] == "copy" or (row["tokens_per_s"] > 0 and row["host_us"] > 0)
