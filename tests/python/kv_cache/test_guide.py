"""Promise: the Python blocks of docs/serving.md run as they stand, one after the other.

Those of the server in C++ are parts of it."""

import re

from support import ROOT


def test_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/serving.md", "exec"), names)


def test_server_blocks_are_parts_of_the_server_in_its_order() -> None:
    """Which test_cpp_server.py builds and runs."""
    server = lines_of((ROOT / "examples" / "serve_cpp" / "serve.cpp").read_text())
    guide = (ROOT / "docs" / "serving.md").read_text()
    blocks = re.findall(r"```cpp server\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 3
    begin = 0
    for block in blocks:
        assert lines_of(block) in server[begin:], block
        begin = server.index(lines_of(block), begin)


def lines_of(source: str) -> str:
    """Without indentation."""
    return "\n".join(line.strip() for line in source.strip().splitlines())


def test_links_exist() -> None:
    links = re.findall(r"\]\(([\w/.]+\.md)[^)]*\)", (ROOT / "docs" / "serving.md").read_text())
    assert links
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]
