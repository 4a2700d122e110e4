"""The benchmark of the module runs, compares what it times, and its rows can be drawn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

BENCHMARKS = ROOT / "benchmarks"
IMPLEMENTATIONS = ["selfattn", "selfattn_tables", "sdpa_mask", "sdpa_cudnn", "projections"]


def start(*command: object) -> subprocess.CompletedProcess:
    """Runs a script of the benchmarks with the library that is tested."""
    paths = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )


def run(*command: object) -> str:
    result = start(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "module.jsonl"
    chosen = [part for name in IMPLEMENTATIONS for part in ("--impl", name)]
    quick = ["--tiny", "--rounds", 1, "--ms", 1, "--pause", 0, "--case", "qk_norm", "--commit", "abc1234"]
    printed = run(BENCHMARKS / "module.py", *quick, *chosen, "--out", path)
    assert "left out" not in printed
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_name_what_was_measured(rows_file: Path) -> None:
    rows = [row for row in read(rows_file) if "ms" in row]
    found = {(row["case"].split()[0], row["impl"], row["pass"]) for row in rows}
    assert found == {
        (kind, name, which)
        for kind, left_out in (("docs", "sdpa_cudnn"), ("dense", "sdpa_mask"))
        for name in IMPLEMENTATIONS
        if name != left_out
        for which in ("forward", "forward+backward")
    }
    for row in rows:
        assert row["commit"] == "abc1234" and row["torch"] == torch.__version__
        assert row["ms"] > 0 and row["tokens_per_s"] == pytest.approx(1e3 * 256 / row["ms"], rel=0.01)
        assert (row["mask_ms"] is not None) == (row["impl"] == "sdpa_mask")
        assert (row["peak_bytes"] is not None) == torch.cuda.is_available()


def test_host_time_is_measured_with_and_without_gradients(rows_file: Path) -> None:
    rows = [row for row in read(rows_file) if "host_us" in row]
    assert {(row["impl"], row["pass"]) for row in rows} == {
        (name, which) for name in ("selfattn", "sdpa_mask") for which in ("forward", "forward without grad")
    }
    assert all(row["host_us"] > 0 for row in rows)


def test_rows_are_drawn(rows_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(BENCHMARKS / "plot.py", "--rows", rows_file, "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"module_forward.png", "module_forward_backward.png"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the full cases run where a GPU is")
def test_full_cases_without_a_gpu_are_refused() -> None:
    result = start(BENCHMARKS / "module.py")
    assert result.returncode == 2 and "need a CUDA GPU" in result.stderr
