"""Every backend computes the written-out softmax over the allowed pairs, for every option, in every dtype it takes."""

import pytest
import reference
import torch
from cases import CASES, PLACES, ROUNDING, Case, error

import selfattn

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def is_served(backend: str, tensors: dict, options: dict) -> bool:
    if backend == "auto":
        return True
    lines = selfattn.explain_backend(**tensors, **options, backend=backend).splitlines()
    return any(line.lstrip().startswith(backend) and "chosen" in line for line in lines)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_equals_the_oracle(case: Case, device: str, backend: str, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype, device)
    expected, expected_lse = reference.attention(**tensors, **case.options)
    call = {**tensors, **case.options, "backend": backend}
    if not is_served(backend, tensors, case.options):
        with pytest.raises(NotImplementedError, match=f"^selfattn: .*{backend}"):
            selfattn.multihead_attention(**call)
        return
    out = selfattn.multihead_attention(**call)
    assert out.dtype == dtype and out.device == tensors["q"].device
    assert error(out, expected) < ROUNDING[dtype]
    try:
        out, lse = selfattn.multihead_attention_lse(**call)
    except NotImplementedError as refusal:
        assert backend in ("aten", "cudnn"), f"{refusal}"  # ATen's operators give no lse
        return
    assert lse.dtype == torch.float32
    assert error(out, expected) < ROUNDING[dtype]
    assert error(lse, expected_lse) < max(ROUNDING[dtype], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_serves_every_case(case: Case, dtype: torch.dtype) -> None:
    assert is_served("reference", case.tensors(dtype), case.options)
