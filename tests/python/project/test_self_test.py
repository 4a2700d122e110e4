"""Promise: `python -m selfattn` says what is installed and what serves, and fails where a result is wrong."""

import json

import pytest
import torch

import selfattn
from selfattn import __main__ as program
from selfattn._library import library_path


def test_says_what_is_here_and_passes(capsys: pytest.CaptureFixture) -> None:
    assert program.main() == 0
    said = capsys.readouterr().out
    build = json.loads(library_path().with_suffix(".json").read_text())
    for part in (
        f"selfattn {build['version']}, {library_path()}",
        f"built for torch {build['torch']}, CUDA {build['cuda'] or 'none'}",
        f"here: torch {torch.__version__}",
        *(f"  {family}: {targets}" for family, targets in build["kernels"].items()),
        "  cpu, float32:\n    flash: chosen",
        "self-test passed",
    ):
        assert part in said
    assert "default" in build["kernels"]["cpu"]


def wrong_result(*args: object, backend: str = "auto") -> torch.Tensor:
    return RIGHT(*args, backend=backend) * (1.1 if backend == "auto" else 1.0)


def no_result(*args: object, **kwargs: object) -> torch.Tensor:
    raise RuntimeError("no kernel")


RIGHT = selfattn.multihead_attention


@pytest.mark.parametrize(
    ("broken", "complaint"), [(wrong_result, "its error is "), (no_result, "RuntimeError: no kernel")]
)
def test_fails_where_the_operator_is_wrong(
    broken: object, complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(selfattn, "multihead_attention", broken)
    monkeypatch.setattr(program, "devices", lambda: [torch.device("cpu")])
    assert program.main() == 1
    said = capsys.readouterr().out
    assert f"cpu, float32, attention: {complaint}" in said and "self-test FAILED in 2 of 6 checks" in said
