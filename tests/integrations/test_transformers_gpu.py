"""The adapter on a GPU: half precision through the kernels, packed rows, generation, no waiting for the device.

Errors are those against a float32 model on the same device, and are held to eager's own in the same precision.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers as hf
from models import NAMES, build, difference, padded, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.gpu
LENGTHS = [70, 7, 130, 1, 40]
every_model = pytest.mark.parametrize("name", NAMES)


def on_gpu(name: str, implementation: str, dtype: torch.dtype = torch.bfloat16, layers: int = 4) -> nn.Module:
    return build(name, implementation, layers=layers).to("cuda", dtype)


def packed() -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {"input_ids": tokens(1, sum(LENGTHS)).cuda(), "position_ids": positions.cuda()}


def of_documents(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    documents = rows["input_ids"].split(LENGTHS, 1)
    return torch.cat([model(document, use_cache=False).logits for document in documents], 1)


def gradients(model: nn.Module, logits: Tensor, weight: Tensor) -> Tensor:
    """Of every parameter that the logits depend on, in one row."""
    found = torch.autograd.grad((logits.float() * weight).sum(), list(model.parameters()), allow_unused=True)
    return torch.cat([gradient.float().flatten() for gradient in found if gradient is not None])


class Calls(TorchDispatchMode):
    """Counts the operators of selfattn."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace == "selfattn":
            self.of[operator._opname] += 1
        return operator(*arguments, **(options or {}))


@contextlib.contextmanager
def errors_at_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_model
def test_packed_rows_in_bfloat16(name: str) -> None:
    exact, eager, model = on_gpu(name, "eager", torch.float32), on_gpu(name, "eager"), on_gpu(name, "selfattn")
    rows = packed()
    weight = torch.randn(1, sum(LENGTHS), 1, device="cuda")
    wanted, theirs, ours = of_documents(exact, rows), of_documents(eager, rows), model(**rows).logits
    assert (ours.float() - wanted).norm() < 2 * (theirs.float() - wanted).norm()
    wanted, theirs, ours = (gradients(*pair, weight) for pair in ((exact, wanted), (eager, theirs), (model, ours)))
    assert (ours - wanted).norm() < 2 * (theirs - wanted).norm()


@every_model
def test_kernels_serve_the_layers(name: str) -> None:
    model = on_gpu(name, "selfattn")
    rows = packed()
    with Calls() as calls:
        model(**rows).logits.sum().backward()
    assert (calls.of["flash_attention"], calls.of["flash_attention_backward"]) == (4, 4)


@pytest.mark.parametrize("side", ["left", "right"])
@every_model
def test_padded_rows_in_bfloat16(name: str, side: str) -> None:
    exact, eager, model = on_gpu(name, "eager", torch.float32), on_gpu(name, "eager"), on_gpu(name, "selfattn")
    rows = {key: value.cuda() for key, value in padded([150, 41, 90], side).items()}
    real = rows["attention_mask"].bool()
    with torch.no_grad():
        wanted, theirs, ours = (each(**rows, use_cache=False).logits[real].float() for each in (exact, eager, model))
    assert (ours - wanted).norm() < 2 * (theirs - wanted).norm()


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@every_model
def test_every_step_of_generation(name: str, cache: str | None) -> None:
    """In float32, where a token is the same token."""
    rows = {key: value.cuda() for key, value in padded([9, 4, 1], "left").items()}
    options = {"max_new_tokens": 9, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"use_cache": False} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    eager, model = (on_gpu(name, implementation, torch.float32) for implementation in ("eager", "selfattn"))
    expected, given = eager.generate(**rows, **options), model.generate(**rows, **options)
    assert torch.equal(given.sequences, expected.sequences)
    assert difference(torch.stack(given.logits), torch.stack(expected.logits)) < 5e-5


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_steps_of_a_cache_in_bfloat16(name: str) -> None:
    """Given tokens, since rounding may choose others: a prompt, then one at a time."""
    row = tokens(2, 40).cuda()

    def logits(implementation: str, dtype: torch.dtype) -> Tensor:
        model = on_gpu(name, implementation, dtype)
        cache = hf.DynamicCache(config=model.config)
        parts = [row[:, :30], *row[:, 30:].split(1, 1)]
        with torch.no_grad():
            return torch.cat([model(part, past_key_values=cache).logits.float() for part in parts], 1)

    wanted = logits("eager", torch.float32)
    theirs, ours = (logits(implementation, torch.bfloat16) for implementation in ("eager", "selfattn"))
    assert (ours - wanted).norm() < 2 * (theirs - wanted).norm()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_attention_never_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = on_gpu(name, "selfattn"), packed()
    model(**rows)
    called = []

    def watched(function: Callable) -> Callable:
        def call(*arguments, **options):
            called.append(function)
            with errors_at_synchronisation():
                return function(*arguments, **options)

        return call

    for interface in (hf.AttentionMaskInterface, hf.AttentionInterface):
        functions = interface._global_mapping
        monkeypatch.setitem(functions, "selfattn", watched(functions["selfattn"]))
    model(**rows)
    model(**{key: value.cuda() for key, value in padded([9, 4], "left").items()})
    assert len(set(called)) == 2 and len(called) > 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_compiled_training_step(name: str) -> None:
    torch._dynamo.reset()
    exact, model = on_gpu(name, "eager", torch.float32, 2), on_gpu(name, "selfattn", layers=2)
    rows = packed()
    weight = torch.randn(1, sum(LENGTHS), 1, device="cuda")
    wanted, plain = of_documents(exact, rows), model(**rows, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True)(**rows, use_cache=False).logits
    assert (compiled.float() - wanted).norm() < 1.5 * (plain.float() - wanted).norm()
    wanted, plain, compiled = (
        gradients(*pair, weight) for pair in ((exact, wanted), (model, plain), (model, compiled))
    )
    assert (compiled - wanted).norm() < 1.5 * (plain - wanted).norm()
