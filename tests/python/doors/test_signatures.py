"""Every Python function has its operator's arguments, in order but required ones first, with its defaults, and can be
scripted."""

import inspect
import re

import pytest
import torch

import selfattn

FUNCTIONS = [
    "append_kv_cache",
    "apply_rotary_emb",
    "attention_with_kv_cache",
    "attention_with_kv_cache_lse",
    "cu_seqlens_from_segment_ids",
    "explain_backend",
    "explain_kv_cache_backend",
    "kv_cache_positions",
    "lengths_after_append",
    "merge_attention",
    "multihead_attention",
    "multihead_attention_lse",
    "precompute_freqs",
    "qk_norm_rope",
    "qk_norm_rope_append",
    "segment_ids_from_cu_seqlens",
    "segment_ids_from_positions",
    "segment_mask",
]


def schema_of(name: str) -> torch.FunctionSchema:
    return getattr(torch.ops.selfattn, name).default._schema


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_and_defaults_are_the_operators(name: str) -> None:
    parameters = inspect.signature(getattr(selfattn, name)).parameters.values()
    required = inspect.Parameter.empty
    actual = [(p.name, p.default) for p in parameters]
    arguments = sorted(schema_of(name).arguments, key=lambda argument: argument.has_default_value())
    expected = [(a.name, a.default_value if a.has_default_value() else required) for a in arguments]
    assert actual == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_documented_and_public(name: str) -> None:
    text = inspect.getdoc(getattr(selfattn, name))  # without indentation, as __doc__ is since Python 3.13
    assert "\nReturns:\n" in text
    others = f"``({'|'.join(FUNCTIONS)})``"
    assert "\nRaises:\n" in text or re.search(rf"\nRaises what {others} raises", text)
    if not re.search(rf"\nArguments are those of {others}", text):
        assert "\nArgs:\n" in text
        for argument in schema_of(name).arguments:
            assert f"{argument.name}: " in text, argument.name
    assert name in selfattn.__all__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_can_be_scripted(name: str) -> None:
    assert f"selfattn::{name}" in str(torch.jit.script(getattr(selfattn, name)).graph)
