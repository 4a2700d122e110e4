"""Promise: what an earlier version of the library saved loads and gives what it gave, and every operator takes the
calls that saved models may hold."""

import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import ROOT
from torch import Tensor

import selfattn  # noqa: F401  (registers the operators)

DATA = ROOT / "tests" / "data"
FILES = sorted(path for path in DATA.iterdir() if path.suffix in (".pt", ".pt2"))


def load(file: Path) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """What makes the calls of a file, and the results that it was written with."""
    kind = file.name.split("_")[0]
    if kind == "aotinductor":
        if platform.machine() != "x86_64":
            pytest.skip(f"{file.name} was compiled for x86_64; got {platform.machine()}")
        package = torch._inductor.aoti_load_package(str(file))
        outputs = package()
        count = len(outputs) // 2
        return lambda: package()[:count], outputs[count:]
    calls = {"torchscript": torch.jit.load, "exported": lambda path: torch.export.load(path).module()}[kind](file)
    return calls, [tensor for name, tensor in calls.named_buffers() if name.startswith("expected_")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
@torch.no_grad()
def test_file_of_an_earlier_version_gives_what_it_gave(file: Path) -> None:
    calls, expected = load(file)
    for _ in range(3):  # the first runs of a script are profiled, later ones are optimised
        results = calls()
        assert len(results) == len(expected) > 0
        for actual, oracle in zip(results, expected, strict=True):
            torch.testing.assert_close(actual, oracle, rtol=1e-5, atol=1e-6)  # processors differ in rounding


# ---------------------------------------------------------------- schemas


def name_of(schema: torch.FunctionSchema) -> str:
    return schema.name + (schema.overload_name and f".{schema.overload_name}")


def registered() -> dict[str, torch.FunctionSchema]:
    schemas = torch._C._jit_get_all_schemas()
    return {name_of(schema): schema for schema in schemas if schema.name.startswith("selfattn::")}


def recorded() -> dict[str, torch.FunctionSchema]:
    schemas = map(torch._C.parse_schema, (DATA / "schemas.txt").read_text().splitlines())
    return {name_of(schema): schema for schema in schemas}


def test_every_operator_is_recorded() -> None:
    """A new one gets a line in schemas.txt, and no line there changes any more: what it says was saved in models."""
    assert sorted(registered()) == sorted(recorded())


def test_every_operator_takes_the_calls_that_were_saved() -> None:
    present = registered()
    assert [name for name, old in recorded().items() if not present[name].is_backward_compatible_with(old)] == []


@pytest.mark.parametrize(
    ("before", "after", "is_taken"),
    [
        ("float softcap=0.", "float softcap=0., float new=1.", True),
        ("float softcap=0.", "float new=1., float softcap=0.", False),
        ("float softcap=0.", "float softcap=0., float new", False),
        ("float softcap=0.", "float softcap=2.", False),
        ("float softcap=0.", "float cap=0.", False),
        ("float softcap=0.", "int softcap=0", False),
        ("-> Tensor", "-> (Tensor, Tensor)", False),
    ],
)
def test_changes_that_break_saved_calls_are_found(before: str, after: str, is_taken: bool) -> None:
    text = "selfattn::f(Tensor q, int window=-1, *, float softcap=0.) -> Tensor"
    old, new = torch._C.parse_schema(text), torch._C.parse_schema(text.replace(before, after))
    assert new.is_backward_compatible_with(old) is is_taken
