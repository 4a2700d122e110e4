"""Promise: the blocks of the documents run as they stand, or are parts of files that other tests build and run.

docs/distributed.md runs in tests/python/distributed, what needs other libraries in tests/integrations.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import ROOT
from support.guides import blocks_of, check_parts, run

import selfattn

GUIDES = sorted((ROOT / "docs").rglob("*.md"))
ELSEWHERE = {"distributed", "integrations", "pretrained_layers"}
PROGRAMS = [guide for guide in GUIDES if guide.stem not in ELSEWHERE and "```python\n" in guide.read_text()]

GIVEN = {  # what a guide's program takes for granted
    "semantics": {
        "selfattn": selfattn,
        "config": SimpleNamespace(rope_parameters={"rope_type": "default"}, max_position_embeddings=64),
        "head_dim": 16,
        "position_ids": torch.arange(5)[None],
        "q": torch.randn(1, 5, 4, 16),
        "k": torch.randn(1, 5, 2, 16),
    },
}


def name_of(guide: Path) -> str:
    return str(guide.relative_to(ROOT))


@pytest.mark.parametrize("guide", PROGRAMS, ids=name_of)
def test_python_runs(guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(guide, GIVEN.get(guide.stem))


@pytest.mark.parametrize("guide", [ROOT / "README.md", *GUIDES], ids=name_of)
def test_cpp_is_part_of_what_is_built(guide: Path) -> None:
    assert not [block.code for block in blocks_of(guide.read_text()) if block.language == "cpp" and not block.file]
    check_parts(guide)
