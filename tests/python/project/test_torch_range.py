"""Promise: the versions of torch that are taken, tested and documented are the same."""

import re

from support import ROOT


def test_range_is_the_same_everywhere() -> None:
    oldest, beyond = re.search(r'"torch>=2\.(\d+),<2\.(\d+)"', (ROOT / "pyproject.toml").read_text()).groups()
    newest = int(beyond) - 1
    assert f"\nTORCHES ?= 2.{oldest} 2.{newest}\n" in (ROOT / "Makefile").read_text()
    for document in ("README.md", "docs/install.md"):
        assert f"torch 2.{oldest} to 2.{newest}" in (ROOT / document).read_text(), document
