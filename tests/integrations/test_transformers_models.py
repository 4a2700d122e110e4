"""attn_implementation="selfattn" gives eager's logits and gradients, on rows with and without padding."""

import pytest
import torch
from models import build, difference, every_model, padded, tokens

LENGTHS = [17, 11, 6]


def _rows(padding: str) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(2, 17)} if padding == "none" else padded(LENGTHS, padding)


def _run(model: torch.nn.Module, rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits of the real tokens, and the gradients of all weights of a sum over them."""
    real = rows.get("attention_mask", torch.ones_like(rows["input_ids"])).bool()
    logits = model(**rows, use_cache=False).logits[real]
    generator = torch.Generator().manual_seed(3)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    return logits.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@every_model
def test_logits_and_gradients_are_those_of_eager(name: str, padding: str) -> None:
    rows = _rows(padding)
    expected, expected_gradients = _run(build(name, "eager"), rows)
    given, gradients = _run(build(name), rows)
    assert difference(given, expected) < 2e-5
    assert gradients.keys() == expected_gradients.keys()
    for weight, gradient in gradients.items():
        assert difference(gradient, expected_gradients[weight]) < 2e-4, weight


@pytest.mark.parametrize("padding", ["none", "left"])
@every_model
def test_bfloat16_is_as_near_to_float32_as_eager(name: str, padding: str) -> None:
    rows = _rows(padding)
    real = rows.get("attention_mask", torch.ones_like(rows["input_ids"])).bool()
    with torch.no_grad():
        exact = build(name, "eager")(**rows).logits[real]
        eager = build(name, "eager").bfloat16()(**rows).logits[real].float()
        given = build(name).bfloat16()(**rows).logits[real].float()

    def error(logits: torch.Tensor) -> float:
        return (logits - exact).norm().item()

    assert error(given) < 1.5 * error(eager) + 1e-3 * exact.norm().item()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_autocast_is_as_near_to_float32_as_eager(name: str) -> None:
    rows = _rows("left")
    logits, gradients = _run(build(name, "eager"), rows)
    with torch.autocast("cpu", torch.bfloat16):
        eager_logits, eager_gradients = _run(build(name, "eager"), rows)
        given_logits, given_gradients = _run(build(name), rows)
    assert (given_logits - logits).norm() < 1.5 * (eager_logits - logits).norm()
    error, eager_error = (
        torch.stack([(found[weight] - gradient).norm() for weight, gradient in gradients.items()]).norm()
        for found in (given_gradients, eager_gradients)
    )
    assert error < 1.5 * eager_error


def test_inference_mode() -> None:
    rows = _rows("left")
    real = rows["attention_mask"].bool()
    with torch.inference_mode():
        expected = build("mistral", "eager")(**rows).logits[real]
        assert difference(build("mistral")(**rows).logits[real], expected) < 2e-5


@every_model
def test_attention_matters_in_the_small_models(name: str) -> None:
    """Else the other tests would pass with any attention: another first token changes what the last one gives."""
    model, row = build(name), tokens(1, 9)
    other = row.clone()
    other[0, 4] = (row[0, 4] + 1) % 90 + 1
    with torch.no_grad():
        assert difference(model(row).logits[:, -1], model(other).logits[:, -1]) > 1e-2
