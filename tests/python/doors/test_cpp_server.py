"""Promise: the C++ server gives each request the text that Python's model finds likeliest, in whatever company."""

import subprocess
from pathlib import Path

import pytest
import torch
from model import LanguageModel
from packing import BOUNDARY
from support.cpp_build import build_example, install_tree
from support.language_model import likeliest_tokens, make_language_model

pytestmark = pytest.mark.slow

MAX_TOKENS = 24
PROMPTS = ["def f(", "x", "class Reader: def read(self, size)", "", "import os"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve_cpp")
    return build_example("serve_cpp", install_tree(folder / "install"), folder / "build") / "serve"


@pytest.fixture
def model() -> LanguageModel:
    return make_language_model()


@pytest.fixture
def model_path(model: LanguageModel, tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    torch.jit.script(model).save(path)
    return path


def serve(program: Path, model_path: Path, num_pages: int, text: str) -> list[tuple[str, str]]:
    """(request, what was said of it) in the order of the lines."""
    command = [program, model_path, str(num_pages), str(MAX_TOKENS)]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [tuple(line.split(" ", 1)) for line in done.stdout.splitlines()]


TOKENS = [7, 21, 4, 24, 8]
"""How many each request generates before its text ends or is cut off; with prompt and room they take 2, 2, 4, 2 and 3
pages."""


@pytest.mark.parametrize(
    ("num_pages", "ended_before"),
    [
        (64, [set(), set(), set(), set(), set()]),
        (6, [set(), set(), {0}, {0, 2}, {0, 1, 2}]),
        (4, [set(), set(), {0, 1}, {0, 1, 2}, {0, 1, 2, 3}]),
    ],
)
def test_texts_are_those_of_python_and_requests_wait_for_pages(
    num_pages: int, ended_before: list[set[int]], program: Path, model: LanguageModel, model_path: Path
) -> None:
    lines = serve(program, model_path, num_pages, "\n".join(PROMPTS) + "\n")
    expected = [likeliest_tokens(model, prompt.encode(), MAX_TOKENS) for prompt in PROMPTS]
    assert list(map(len, expected)) == TOKENS
    for number, tokens in enumerate(expected):
        assert [said for request, said in lines if request == str(number)] == [*map(str, tokens), "end"]
        begin = [request for request, _ in lines].index(str(number))
        assert {int(request) for request, said in lines[:begin] if said == "end"} == ended_before[number]


def test_request_that_no_pool_could_hold_is_refused_and_others_are_served(program: Path, model_path: Path) -> None:
    lines = serve(program, model_path, 4, "x" * 200 + "\nx")
    assert lines[0] == ("0", "too long") and lines[-1] == ("1", "end")


def test_request_that_comes_late_joins_those_that_run(program: Path, model: LanguageModel, model_path: Path) -> None:
    with torch.no_grad():
        model.head.weight[BOUNDARY] *= 0  # texts do not end by themselves
    torch.jit.script(model).save(model_path)
    command = [program, model_path, "256", "1500"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        process.stdin.write("first\n")
        assert process.stdout.readline().startswith("0 ")
        process.stdin.write("second\n")
        process.stdin.close()
        lines = process.stdout.read().splitlines()
    assert process.returncode == 0
    assert [line for line in lines if line.endswith("end")] == ["0 end", "1 end"]
    assert any(line.startswith("1 ") for line in lines[: lines.index("0 end")])
