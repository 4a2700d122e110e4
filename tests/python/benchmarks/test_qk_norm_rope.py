"""The benchmark of qk_norm_rope runs every case, and its rows say what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

SCRIPT = ROOT / "benchmarks" / "qk_norm_rope.py"
QUICK = ["--tiny", "--rounds", "1", "--repeats", "1", "--pause", "0"]


def run(*options: str) -> subprocess.CompletedProcess:
    """Runs the script with the library that is tested."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_rows_name_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "qk_norm_rope.jsonl"
    result = run(*QUICK, "--commit", "abc1234", "--out", str(path))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    cases = {row["case"] for row in rows}
    assert "norm rotary D128" in cases and "rotary D64" in cases
    expected = {(c, impl, p) for c in cases for impl in ("selfattn", "copy") for p in ("forward", "backward")}
    assert {(row["case"], row["impl"], row["pass"]) for row in rows} == expected and len(rows) == len(expected)
    for row in rows:
        assert row["ms"] > 0 and row["gbps"] > 0 and row["commit"] == "abc1234" and row["torch"] == torch.__version__
        assert row["impl"] == "selfattn" or row["ratio"] == 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the full cases run where a GPU is")
def test_full_cases_without_a_gpu_are_refused() -> None:
    result = run()
    assert result.returncode == 2 and "need a CUDA GPU" in result.stderr
