"""Every backend computes the written-out softmax over the allowed pairs, for every option, in every dtype it takes."""

import pytest
import torch
from support import reference
from support.cases import CASES, PLACES, ROUNDING
from support.problems import Case, error
from support.serving_table import describe, is_refused

import selfattn

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_equals_the_oracle(case: Case, device: str, backend: str, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype, device)
    expected, expected_lse = reference.attention(**tensors, **case.options)
    call = {**tensors, **case.options, "backend": backend}
    facts = describe(**tensors, **case.options)
    if is_refused(backend, facts, lambda: selfattn.multihead_attention(**call)):
        return
    out = selfattn.multihead_attention(**call)
    assert out.dtype == dtype and out.device == tensors["q"].device
    assert error(out, expected) < ROUNDING[dtype]
    if is_refused(backend, facts.with_(wants_lse=True), lambda: selfattn.multihead_attention_lse(**call)):
        return
    out, lse = selfattn.multihead_attention_lse(**call)
    assert lse.dtype == torch.float32
    assert error(out, expected) < ROUNDING[dtype]
    assert error(lse, expected_lse) < max(ROUNDING[dtype], 1e-6)
