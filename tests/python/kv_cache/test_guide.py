"""Promise: the Python blocks of docs/serving.md run as they stand, one after the other."""

import re

from support import ROOT


def test_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/serving.md", "exec"), names)


def test_links_exist() -> None:
    links = re.findall(r"\]\(([\w/.]+\.md)[^)]*\)", (ROOT / "docs" / "serving.md").read_text())
    assert links
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]
