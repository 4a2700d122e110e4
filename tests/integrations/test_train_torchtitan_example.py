"""examples/train_torchtitan runs, learns, and notices rows whose documents see each other."""

import os
import subprocess
import sys

from conftest import ROOT

EXAMPLE = ROOT / "examples" / "train_torchtitan"
SMALL = ["--device", "cpu", "--rows", "2", "--length", "128", "--longest", "90", "--width", "64", "--layers", "2"]


def run(*command: str) -> subprocess.CompletedProcess:
    """In a process of its own: the example's modules have everyday names."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLE)])}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500)


def test_runs_and_passes_its_checks() -> None:
    result = run(str(EXAMPLE / "train.py"), *SMALL, "--steps", "25")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("passed: ") == 3


def test_fails_where_the_loss_does_not_fall() -> None:
    result = run(str(EXAMPLE / "train.py"), *SMALL, "--steps", "3", "--learning-rate", "0")
    assert result.returncode == 1 and "FAILED: the loss of two other rows fell" in result.stdout


def test_checks_notice_attention_across_documents() -> None:
    code = """
import argparse, torch
from checks import difference_from_documents, difference_from_flex_attention
from documents import batches, read_documents
from train import build_model
from selfattn.integrations.torchtitan import DocumentIds
torch.manual_seed(0)
model = build_model(argparse.Namespace(width=64, layers=2, length=128, device="cpu"))
tokens, _ = next(batches(read_documents(90, files=5), 2, 128, seed=0))
print(difference_from_documents(model, tokens), difference_from_flex_attention(model, tokens))
model.get_attention_masks = lambda tokens, tokenizer: DocumentIds.of(torch.zeros_like(tokens))
print(difference_from_documents(model, tokens), difference_from_flex_attention(model, tokens))
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    numbers = list(map(float, result.stdout.split()))
    assert max(numbers[:2]) < 1e-5 and min(numbers[2:]) > 1e-3
