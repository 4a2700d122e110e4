"""Promise: the blocks of the documents run as they stand, or are parts of files that other tests build and run.

docs/scale_out.md runs in tests/python/distributed, what needs other libraries in tests/integrations.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import ROOT
from support.pages import blocks_of, check_parts, run

import selfattn

PAGES = sorted((ROOT / "docs").rglob("*.md"))
ELSEWHERE = {"scale_out", "integrations", "pretrained_layers"}
PROGRAMS = [page for page in PAGES if page.stem not in ELSEWHERE and "```python\n" in page.read_text()]

GIVEN = {  # what a page's program takes for granted
    "semantics": {
        "selfattn": selfattn,
        "config": SimpleNamespace(rope_parameters={"rope_type": "default"}, max_position_embeddings=64),
        "head_dim": 16,
        "position_ids": torch.arange(5)[None],
        "q": torch.randn(1, 5, 4, 16),
        "k": torch.randn(1, 5, 2, 16),
    },
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PROGRAMS, ids=name_of)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page, GIVEN.get(page.stem))


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=name_of)
def test_cpp_is_part_of_what_is_built(page: Path) -> None:
    assert not [block.code for block in blocks_of(page.read_text()) if block.language == "cpp" and not block.file]
    check_parts(page)
