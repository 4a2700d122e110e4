"""Neither the mask nor a layer asks a tensor for a value: on a GPU that would wait for the device."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from models import build, padded, tokens
from torch.utils._python_dispatch import TorchDispatchMode

READERS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"}


class Reads(TorchDispatchMode):
    """Collects the operators that give the host a value, or a shape that depends on one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.found = 0, []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.calls += 1
        name = operator.name().split("::")[1].split(".")[0]
        masks = name == "index" and any(index is not None and index.dtype == torch.bool for index in arguments[1])
        if name in READERS or masks:
            self.found.append(name)
        return operator(*arguments, **(options or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """What the two functions of selfattn read, and no other part of the models."""
    watch = Reads()

    def watched(function: Callable) -> Callable:
        def call(*arguments, **options):
            with watch:
                return function(*arguments, **options)

        return call

    for interface in (hf.AttentionMaskInterface, hf.AttentionInterface):
        functions = interface._global_mapping
        monkeypatch.setitem(functions, "selfattn", watched(functions["selfattn"]))
    return watch


def _packed(model: torch.nn.Module) -> None:
    model(tokens(1, 12), position_ids=torch.arange(6).repeat(2)[None])
    model(tokens(1, 12), segment_ids=torch.arange(2).repeat_interleave(6)[None])
    model(tokens(1, 12), cu_seq_lens_q=torch.tensor([0, 5, 12]).int())


def _padded(model: torch.nn.Module) -> None:
    model(**padded([9, 4], "left"))
    model(**padded([9, 4], "right"), use_cache=False)


def _generated(model: torch.nn.Module) -> None:
    rows = padded([9, 4], "left")
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        model.generate(**rows, max_new_tokens=7, do_sample=False, **options)


def _in_parts(model: torch.nn.Module) -> None:
    cache = hf.StaticCache(config=model.config, max_cache_len=32)
    head_dim = model.model.layers[0].self_attn.head_dim
    cache.early_initialization(2, model.config.num_key_value_heads, head_dim, torch.float32, "cpu")
    for _ in range(2):
        model(tokens(2, 5), cache=cache)


@pytest.mark.parametrize("use", [_packed, _padded, _generated, _in_parts])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_no_value_is_read(name: str, use: Callable, reads: Reads) -> None:
    use(build(name, layers=2))
    assert reads.calls > 10
    assert reads.found == []


def test_a_read_would_be_seen(reads: Reads) -> None:
    numbers = torch.arange(3)
    for read in (
        lambda: numbers[0].item(),
        lambda: bool(numbers.any()),
        lambda: range(numbers[1]),
        lambda: numbers[numbers > 1],
    ):
        with reads:
            read()
        assert reads.found
        reads.found.clear()
