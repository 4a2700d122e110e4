"""The demo program does what its last lines say, fails when a check fails, and goes on after an interrupt, or after one
of its ranks died."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import ROOT
from support.cpp_build import install_tree

import selfattn

DEMO = ROOT / "examples" / "train_packed" / "demo.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(selfattn.__file__).parents[1]),
    "COLUMNS": "200",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A few hundred files of text, so that some are held out."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(200):
        text = "\n\n\n".join(f"def function_{n}(x):\n    return x + {n}" for n in range(number % 9 + 1))
        (folder / f"file_{number}.py").write_text(text)
    return folder


def command(data: Path, *options: str) -> list[str]:
    """Without the C++ program, unless an option names an install tree."""
    fixed = ["--size", "tiny", "--device", "cpu", "--data", str(data), "--out", "out", "--install-tree", "none"]
    return [sys.executable, str(DEMO), *fixed, *options]


def run(data: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(data, *options), cwd=data.parent, env=ENVIRONMENT, capture_output=True, text=True)


def start(command: list[str], folder: Path) -> subprocess.Popen:
    """Until its first checkpoint is there."""
    process = subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not any(folder.glob("out/checkpoints/*/.metadata")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


def resume(data: Path, *options: str) -> int:
    """From which step; to the end."""
    done = run(data, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((data.parent / "out" / "record.json").read_text())
    assert len(record["history"]["bits_per_byte"]) == record["plan"]["steps"]
    return int(re.search(r"Going on from step (\d+)", done.stdout).group(1))


def test_run_leaves_model_picture_and_record(data: Path) -> None:
    done = run(data, "--steps", "40")
    assert done.returncode == 0, done.stdout + done.stderr
    out = data.parent / "out"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "record.json").read_text())
    assert record["plan"]["steps"] == 40 and len(record["history"]["bits_per_byte"]) == 40
    assert record["held_out_bits_per_byte"] < record["bound"] and all(record["checks"].values())
    assert record["isolation"]["documents_changed"] > 1
    assert [comparison["row_length"] for comparison in record["side_by_side"]] == [128, 256]
    logits = torch.jit.load(str(out / "model.pt"))(torch.tensor([[256, 100, 101, 102]]))
    assert logits.shape == (1, 4, 257)
    assert not (out / "checkpoints").exists()


def test_bound_that_is_missed_fails_the_run(data: Path) -> None:
    done = run(data, "--bound", "0.01")
    assert done.returncode == 1
    assert re.search(r"FAILED +held-out loss [\d.]+ bits per byte is below 0\.010", done.stdout)


def test_folder_without_text_says_so(data: Path) -> None:
    done = run(data, "--suffix", ".txt")
    assert done.returncode != 0 and "too little text" in done.stderr and ".txt" in done.stderr


def test_interrupted_run_goes_on(data: Path) -> None:
    process = start(command(data, "--steps", "150"), data.parent)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    stopped_at = int(re.search(r"go on from step (\d+)", output).group(1))
    assert 0 < stopped_at < 150
    assert resume(data, "--steps", "150") == stopped_at


def test_run_whose_rank_died_goes_on_in_one_process(data: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start([*torchrun, *command(data, "--steps", "150")[1:]], data.parent)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Signal 9 (SIGKILL)" in output, output
    assert 0 < resume(data, "--steps", "150") < 150


@pytest.mark.slow
def test_cpp_program_has_the_logits_of_python(data: Path) -> None:
    tree = install_tree(data.parent / "installed")
    done = run(data, "--steps", "40", "--prompt", "def f", "--install-tree", str(tree))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the logits of the C++ program are equal to Python's, bit by bit" in done.stdout
