"""examples/finetune_hf runs, learns, and notices a packed row that is not its documents."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

EXAMPLE = ROOT / "examples" / "finetune_hf"
SMALL = ["--steps", "12", "--tokens", "256", "--longest", "96", "--width", "64", "--layers", "2", "--speed-steps", "1"]


def run(*command: str) -> subprocess.CompletedProcess:
    """In a process of its own: the example's modules have everyday names."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLE)]), "COLUMNS": "200"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def finished() -> subprocess.CompletedProcess:
    options = ["--device", "cpu", "--implementations", "selfattn", "sdpa", "no_such_attention"]
    return run(str(EXAMPLE / "finetune.py"), *SMALL, *options)


def test_runs_and_passes_its_checks(finished) -> None:
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("passed: ") == 2 and "FAILED" not in finished.stdout


def test_table_holds_every_implementation(finished) -> None:
    rows = {line.split("│")[1].strip(): line for line in finished.stdout.splitlines() if line.startswith("│")}
    assert set(rows) == {"selfattn", "sdpa", "no_such_attention"}
    assert "does not run" in rows["no_such_attention"]
    for name in ("selfattn", "sdpa"):
        assert "relative difference" in rows[name] and int(rows[name].split("│")[2].replace(",", "")) > 0


def test_fails_where_the_loss_does_not_fall() -> None:
    options = ["--device", "cpu", "--implementations", "selfattn", "--learning-rate", "0", "--steps", "2"]
    result = run(str(EXAMPLE / "finetune.py"), *SMALL, *options)
    assert result.returncode == 1 and "FAILED: the loss fell" in result.stdout


def test_check_notices_attention_across_documents() -> None:
    """The adapters of a model whose packed rows are one document each."""
    code = """
import checks, torch
from documents import batches, read_documents
from model import build_model
model = build_model(width=64, layers=2, longest=96, rank=4, device="cpu", dtype=torch.float32)
rows = next(batches(read_documents(48, 96, files=5), tokens=256, seed=0))
assert len(rows) > 1
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.1)
print(checks.packing_error(model, rows))
pack = checks.pack
checks.pack = lambda *args: {name: x for name, x in pack(*args).items() if name != "position_ids"}
print(checks.packing_error(model, rows))
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    right, wrong = map(float, result.stdout.split())
    assert right < 1e-5 and wrong > 1e-2
