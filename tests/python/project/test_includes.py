"""No folder of csrc includes one above it or beside it: docs/architecture.md draws the order."""

import re
from pathlib import Path

import pytest
from support import ROOT

# From the bottom to the top. Folders of one level do not know each other.
LEVELS = (
    {"common"},
    {"rotary", "segment"},
    {"attention"},
    {"kv_cache"},
    {"backend", "norm_rope_attention"},
    {"distributed"},
    {"autocast", "autograd", "cpu", "cuda", "functorch", "meta"},
    {"module", "sdpa"},
    {"."},  # library.cpp and ops.cpp: the schemas and the C++ fronts
)
LEVEL_OF = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def room(path: Path, csrc: Path) -> str:
    """The folder of csrc that a file lies in."""
    parts = path.relative_to(csrc).parts
    return parts[0] if len(parts) > 1 else "."


def find_included(name: str, source: Path, csrc: Path) -> Path:
    """The file that `#include "name"` means: beside the source, in csrc, or in csrc/cuda."""
    for folder in (source.parent, csrc, csrc / "cuda"):
        if (folder / name).exists():
            return (folder / name).resolve()
    raise FileNotFoundError(f"{source} includes {name}, which is nowhere in {csrc}")


def wrong_includes(csrc: Path) -> list[str]:
    wrong = []
    for source in sorted(path for path in csrc.rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"}):
        own = room(source, csrc)
        for name in INCLUDE.findall(source.read_text()):
            other = room(find_included(name, source, csrc), csrc)
            if other != own and LEVEL_OF[other] >= LEVEL_OF[own]:
                wrong.append(f"{source.relative_to(csrc)} includes {name}, and {other} is not below {own}")
    return wrong


def test_every_folder_has_a_level() -> None:
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    assert folders == set(LEVEL_OF) - {"."}


def test_no_folder_includes_one_above_it() -> None:
    assert wrong_includes(ROOT / "csrc") == []


@pytest.mark.parametrize(
    ("source", "included", "is_wrong"),
    [
        ("attention/a.h", "common/b.h", False),
        ("attention/a.h", "attention/b.h", False),
        ("common/a.h", "attention/b.h", True),
        ("rotary/a.cpp", "segment/b.h", True),
        ("cuda/flash/a.cu", "flash/b.cuh", False),
        ("cuda/flash/a.cu", "module/b.h", True),
        ("module/a.cpp", "autograd/b.h", False),
    ],
)
def test_rule_tells_up_from_down(tmp_path: Path, source: str, included: str, is_wrong: bool) -> None:
    target = tmp_path / ("cuda" if included.startswith("flash/") else "") / included
    for path in (tmp_path / source, target):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / source).write_text(f'#pragma once\n#include <tuple>\n#include "{included}"\n')
    assert len(wrong_includes(tmp_path)) == is_wrong
