"""The C++ generator gives each prompt the text that it has alone and without a cache, however many share the batch."""

import subprocess
from pathlib import Path

import pytest
import torch
from export import build_generator, export_torchscript, run_generator
from generation import ROUNDINGS, compare_runs, prompt_difference, rounding_of
from model import LanguageModel
from packing import BOUNDARY
from support.cpp_build import install_tree
from support.language_model import likeliest_tokens, make_language_model

pytestmark = pytest.mark.slow

MAX_BYTES = 24
PROMPTS = [
    b"def f(",
    b"x",
    b"class Reader:\n    def read(self, size",
    b"",
    b"import os",
    b"return self.name",
    b"    if",
]
LIKELIEST = ("--temperature", "0", "--bytes", str(MAX_BYTES))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    return build_generator(install_tree(folder / "install"), folder / "build")


@pytest.fixture
def model() -> LanguageModel:
    return make_language_model()


@pytest.fixture
def model_path(model: LanguageModel, tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    export_torchscript(model, path)
    return path


@pytest.mark.parametrize("way", (["--uncached"], *(["--rows", rows] for rows in ("1", "2", "3", "8"))), ids=" ".join)
def test_texts_are_those_of_python(way: list[str], program: Path, model: LanguageModel, model_path: Path) -> None:
    expected = [likeliest_tokens(model, prompt, MAX_BYTES) for prompt in PROMPTS]
    lengths = {len(tokens) for tokens in expected}
    assert 1 in lengths or len(lengths) > 3, "prompts must leave the batch at different times"
    assert MAX_BYTES in lengths, "and some be cut off"
    run = run_generator(program, model_path, PROMPTS, *LIKELIEST, *way)
    assert [tokens.tolist() for tokens in run.tokens] == expected
    read = [len(prompt) + len(tokens) for prompt, tokens in zip(PROMPTS, expected, strict=True)]
    assert [len(logits) for logits in run.logits] == read


def test_logits_of_a_prompt_are_those_of_python(program: Path, model: LanguageModel, model_path: Path) -> None:
    assert prompt_difference(program, model, model_path, PROMPTS[2]) == 0.0


def test_logits_are_those_without_a_cache(program: Path, model_path: Path, device: str) -> None:
    """On a GPU a step is a replay of one captured graph."""
    options = (*LIKELIEST, "--device", device)
    uncached = run_generator(program, model_path, PROMPTS, *options, "--uncached")
    cached = run_generator(program, model_path, PROMPTS, *options, "--rows", "3")
    agreement = compare_runs(cached, uncached, rounding_of(device))
    assert 0.0 < agreement.largest_error <= ROUNDINGS and agreement.texts_agree
    assert agreement.compared >= len(PROMPTS)


def test_drawn_texts_are_the_same_in_every_run(program: Path, model_path: Path) -> None:
    options = ("--temperature", "1.5", "--bytes", "8")
    first, second = (run_generator(program, model_path, PROMPTS, *options) for _ in range(2))
    assert all(map(torch.equal, first.tokens, second.tokens))
    likeliest = run_generator(program, model_path, PROMPTS, "--temperature", "0", "--bytes", "8")
    assert not all(map(torch.equal, first.tokens, likeliest.tokens))


def text_of(tokens: torch.Tensor) -> str:
    return bytes(token for token in tokens.tolist() if token != BOUNDARY).decode(errors="replace")


def test_output_is_in_the_order_of_the_prompts(program: Path, model_path: Path) -> None:
    alone = run_generator(program, model_path, PROMPTS[:1], *LIKELIEST)
    assert alone.output == text_of(alone.tokens[0]) + "\n"
    run = run_generator(program, model_path, PROMPTS, *LIKELIEST, "--rows", "2")
    headings = [run.output.index(f"prompt_{number}.txt\n") for number in range(len(PROMPTS))]
    assert headings == sorted(headings)
    for heading, tokens in zip(headings, run.tokens, strict=True):
        assert run.output[heading + len("prompt_0.txt\n") :].startswith(text_of(tokens))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "0"], "--rows: expected a positive whole number, got 0"),
        (["--bytes", "many"], "--bytes: expected a positive whole number, got many"),
        (["--temperature", "-1"], "--temperature: expected a number >= 0, got -1"),
        (["--device", "tpu"], "--device: expected cpu or cuda, got tpu"),
        (["--greedy"], "--greedy: no such option"),
        (["--record"], "--record: expected a value, got none"),
        (["model.pt"], "expected a model and at least one prompt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_command_lines_are_named(words: list[str], message: str, program: Path) -> None:
    done = subprocess.run([program, *words], capture_output=True, text=True)
    assert done.returncode == 2 and f"generate: {message}" in done.stderr and "usage: generate" in done.stderr


def test_missing_prompt_is_named(program: Path, model_path: Path) -> None:
    done = subprocess.run([program, model_path, "nothing.txt"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip() == "generate: cannot read nothing.txt"
