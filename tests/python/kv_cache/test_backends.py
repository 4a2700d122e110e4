"""Promise: what serves a call over a cache is what the serving table says; the explanation and the refusal say why."""

import pytest
import torch
from support.kv_cache import CacheCase
from support.serving_table import CACHE_TABLE, ORDER, serves_cache

import selfattn

CASES = {
    "plain": CacheCase(),
    "softcap": CacheCase(softcap=1.0),
    "sinks": CacheCase(has_sinks=True),
    "splits": CacheCase(split_keys=128),
    "ragged": CacheCase(num_queries=4, ids="chunks"),
    "tree": CacheCase(num_queries=4, has_draft_mask=True),
    "float64": CacheCase(dtype=torch.float64),
    "no_rows": CacheCase(rows=0, table=None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_explanation_is_the_table(case: CacheCase, device: str) -> None:
    call = case.make(device)
    lines = selfattn.explain_kv_cache_backend(**call).splitlines()
    assert [line.split(":")[0] for line in lines] == list(ORDER)
    able = [backend for backend in ORDER if serves_cache(backend, call)]
    for backend, line in zip(ORDER, lines, strict=True):
        if backend == able[0]:
            assert line == f"{backend}: chosen"
        elif backend in able:
            assert line == f"{backend}: can serve this call"
        else:
            assert line.startswith(f"{backend}: cannot serve this call: ")


@pytest.mark.parametrize("backend", [name for name in ORDER if name not in CACHE_TABLE])
def test_others_refuse_every_call(backend: str, device: str) -> None:
    with pytest.raises(NotImplementedError, match=f"^selfattn: backend '{backend}' cannot serve this call: "):
        selfattn.attention_with_kv_cache(**CacheCase().make(device), backend=backend)


def test_kernels_refuse_what_flash_refuses() -> None:
    call = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in CacheCase(dtype=torch.float64).make().items()
    }
    with pytest.raises(NotImplementedError, match=r"flash_attention_kv_cache cannot serve this call: .*Double"):
        torch.ops.selfattn.flash_attention_kv_cache(**call)


def test_reserved_scales_are_refused(device: str) -> None:
    call = CacheCase().make(device)
    for name in ("k_scale", "v_scale"):
        with pytest.raises(NotImplementedError, match=f"selfattn: {name} must not be given"):
            selfattn.attention_with_kv_cache(**call, **{name: torch.ones((), device=device)})
