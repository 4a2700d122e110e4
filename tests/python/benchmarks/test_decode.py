"""The benchmark of attention over a KV cache on CUDA runs, and its rows name what they measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support import ROOT


def test_rows_name_what_they_measured(tmp_path: Path) -> None:
    path = tmp_path / "decode.jsonl"
    chosen = [
        "--tiny",
        "--case",
        "D64",
        "--case",
        "append",
        "--case",
        "chunk",
        "--impl",
        "selfattn",
        "--impl",
        "selfattn_ids",
        "--impl",
        "flashinfer",
    ]
    quick = ["--rounds", "1", "--repeats", "1", "--out", str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, ROOT / "benchmarks" / "decode.py", *chosen, *quick]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    measured = [row for row in rows if "us" in row]
    assert {row["impl"] for row in measured} >= {"selfattn", "copy", "empty"}
    assert any("append" in row["case"] for row in measured)
    for row in measured:
        assert row["us"] > 0 and row["share"] > 0 and row["mb"] > 0
        assert row["commit"] and row["date"] and row["device"]
    for row in rows:
        assert "us" in row or row["error"]
