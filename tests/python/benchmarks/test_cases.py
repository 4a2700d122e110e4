"""The cases of the attention benchmark are what their names say, and a forced family reaches the library."""

import os
import subprocess
import sys

import pytest
import torch
from support import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import cases
from cases import SETS, Case


@pytest.mark.parametrize("name", SETS)
def test_names_tell_the_cases_of_a_set_apart(name: str) -> None:
    assert len({case.name for case in SETS[name]}) == len(SETS[name])


def test_operations_are_those_of_the_matrix_products() -> None:
    case = Case("full", 6, 10, 2, value_dim=4, num_heads=3)
    products = 2 * 2 * 3 * 10 * 10
    assert case.flops("forward") == products * (6 + 4)
    assert case.flops("backward") == products * (3 * 6 + 2 * 4)
    assert case.flops("forward+backward") == case.flops("forward") + case.flops("backward")
    square = Case("causal", 64, 100, 1)
    assert square.flops("forward") == 4 * 64 * 32 * 100 * 100 / 2
    assert square.flops("backward") == 2.5 * square.flops("forward")


def test_tensors_have_the_dimensions_and_the_precision() -> None:
    q, k, v = Case("causal", 8, 4, 1, value_dim=16, num_heads=2, precision="tf32").tensors("cpu")
    assert q.shape == k.shape == (1, 4, 2, 8) and v.shape == (1, 4, 2, 16)
    assert {tensor.dtype for tensor in (q, k, v)} == {torch.float32}
    assert Case("causal", 8, 4, 1).tensors("cpu")[0].dtype == torch.bfloat16


def test_hashed_ids_are_the_same_documents_in_no_order() -> None:
    numbers, hashes = (Case("docs", 64, 4096, 1, 64, has_names=flag).segment_ids("cpu") for flag in (False, True))
    starts = numbers[0].diff() != 0
    assert torch.equal(starts, hashes[0].diff() != 0)
    assert hashes.unique().numel() == numbers.unique().numel() == int(starts.sum()) + 1
    assert bool((hashes[0].diff() < 0).any())


def test_family_option_reaches_the_environment_and_the_record() -> None:
    program = """
import argparse, os, measure
parser = argparse.ArgumentParser()
measure.add_family_option(parser)
parser.parse_args(["--family", "sm80"])
print(os.environ["SELFATTN_FLASH_FAMILY"], measure.describe_run("abc")["family"])
"""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(cases.__file__)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sm80", "sm80" if torch.cuda.is_available() else "None"]
