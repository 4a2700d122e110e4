"""The benchmark of attention over a KV cache on the CPU runs, beside what it compares with."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support import ROOT


def test_rows_name_what_they_measured(tmp_path: Path) -> None:
    path = tmp_path / "decode.jsonl"
    chosen = ["--cases", "32:4 D64", "32:8 D128 Sq1 page16", "--dtypes", "bfloat16", "--threads", "1"]
    quick = ["--megabytes", "1", "--repeats", "1", "--out", str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, ROOT / "benchmarks" / "decode_cpu.py", *chosen, *quick]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = [(row["case"], row["impl"]) for row in rows]
    dense = [("32:4 D64 Sq1", impl) for impl in ("read", "selfattn", "sdpa_gqa", "sdpa_rows")]
    assert names == dense + [("32:8 D128 Sq1 page16", impl) for impl in ("read", "selfattn")]
    for row in rows:
        assert row["threads"] == 1 and row["dtype"] == "bfloat16" and row["commit"] and row["date"] and row["device"]
        assert row["gb_per_s"] > 0 and row["share"] > 0
        assert abs(row["gb_per_s"] - row["cache_mb"] / row["ms"]) < 0.05 * row["gb_per_s"] + 0.05
