"""Runs of the generator are compared as promised: logits by roundings, texts until a choice is one of rounding."""

import torch
from export import GeneratorRun
from generation import ROUNDINGS, compare_runs, rounding_of

ROUNDING = rounding_of("cpu")
PROMPT_TOKENS = 3


def make_run(tokens: list[int]) -> GeneratorRun:
    """Of a model whose best logit is 8, that of the token that comes next."""
    logits = torch.zeros(PROMPT_TOKENS - 1 + len(tokens), 10)
    logits[torch.arange(PROMPT_TOKENS - 1, len(logits)), tokens] = 8.0
    return GeneratorRun("", 2.0, [torch.tensor(tokens)], [logits])


def test_equal_runs() -> None:
    agreement = compare_runs(make_run([1, 2, 3]), make_run([1, 2, 3]), ROUNDING)
    assert agreement.largest_error == 0.0 and agreement.compared == 3 and agreement.texts_agree


def test_errors_count_in_roundings_of_the_largest_logit() -> None:
    run = make_run([1, 2, 3])
    run.logits[0][1, 0] += 5 * 8.0 * ROUNDING
    assert abs(compare_runs(run, make_run([1, 2, 3]), ROUNDING).largest_error - 5) < 1e-3


def test_another_text_after_a_clear_choice_fails() -> None:
    agreement = compare_runs(make_run([1, 5, 3]), make_run([1, 2, 3]), ROUNDING)
    assert agreement.compared == 1 and not agreement.texts_agree
    assert agreement.largest_error > ROUNDINGS  # the logits that made the choice are compared, too


def test_another_text_after_a_choice_of_rounding_passes() -> None:
    run, expected = make_run([1, 5, 4]), make_run([1, 2, 3])
    expected.logits[0][PROMPT_TOKENS, 5] = 8.0 * (1 - ROUNDING)
    run.logits[0][PROMPT_TOKENS] = expected.logits[0][PROMPT_TOKENS]
    run.logits[0][PROMPT_TOKENS, 5] = 8.0 * (1 + ROUNDING)
    agreement = compare_runs(run, expected, ROUNDING)
    assert agreement.compared == 1 and agreement.texts_agree
    assert agreement.largest_error < ROUNDINGS  # what comes after is another text's


def test_tokens_a_second() -> None:
    assert make_run([1, 2, 3]).tokens_per_second == 1.5
