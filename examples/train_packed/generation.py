"""What a generator with a KV cache must promise: the logits, and so the text, that there are without one."""

from dataclasses import dataclass
from pathlib import Path

import torch
from documents import Corpus
from export import GeneratorRun, prompt_logits, run_generator
from model import LanguageModel

ROUNDINGS = 16
"""How many roundings of the largest logit two ways to compute a logit may differ by: other matrix products add up in
another order, in every layer."""


@dataclass(frozen=True)
class Agreement:
    """Of two runs with the same prompts that take the likeliest token."""

    largest_error: float
    """Between logits of tokens that both read after the same text, in roundings of the largest logit."""
    compared: int
    """Tokens that both generated after the same text."""
    texts_agree: bool
    """Where texts part, the two best logits lie within ROUNDINGS."""


def compare_runs(run: GeneratorRun, expected: GeneratorRun, rounding: float) -> Agreement:
    """``rounding``: the distance from 1 to the next number of the dtype that was computed in."""
    largest_error, compared, texts_agree = 0.0, 0, True
    for tokens, logits, expected_tokens, expected_logits in zip(
        run.tokens, run.logits, expected.tokens, expected.logits, strict=True
    ):
        same = _common_length(tokens, expected_tokens)
        read = len(expected_logits) - len(expected_tokens) + 1 + same  # the prompt, and what both read after it
        of_same_text = expected_logits[:read]
        unit = rounding * of_same_text.abs().max()
        error = (logits[:read] - of_same_text).abs().max() / unit
        largest_error = max(largest_error, error.item())
        compared += same
        if same < max(len(tokens), len(expected_tokens)):
            best, second = of_same_text[-1].topk(2).values
            texts_agree &= bool(best - second <= ROUNDINGS * unit)
    return Agreement(largest_error, compared, texts_agree)


def rounding_of(device: str) -> float:
    """Of the dtype that the C++ program computes in there."""
    return torch.finfo(torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32).eps


def openings(corpus: Corpus, count: int) -> list[bytes]:
    """Prompts of different lengths: how the first held-out documents begin."""
    return [document[: 12 + 9 * number] for number, document in enumerate(corpus.held_out[:count])]


def prompt_difference(program: Path, model: LanguageModel, model_path: Path, prompt: bytes) -> float:
    """The largest one between the logits of C++ and of Python, neither with a cache, on the CPU."""
    expected = prompt_logits(model, prompt)
    run = run_generator(program, model_path, [prompt], "--uncached", "--bytes", "1")
    return (run.logits[0] - expected).abs().max().item()


def _common_length(tokens: torch.Tensor, others: torch.Tensor) -> int:
    shorter = min(len(tokens), len(others))
    differs = (tokens[:shorter] != others[:shorter]).nonzero()
    return int(differs[0]) if len(differs) else shorter
