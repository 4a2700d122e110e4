"""The fenced blocks of README.md and docs/**.md.

A Python block runs. A block of any language that names a file (```cpp examples/serve_cpp/serve.cpp) is a part of that
file, which another test builds or runs; the parts of one file, between empty lines, stand in its order.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support import ROOT


@dataclass(frozen=True)
class Block:
    language: str
    file: str
    """From the repository's root, or empty."""
    code: str


def blocks_of(text: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]


def programs_of(text: str) -> list[str]:
    """The Python blocks that run."""
    return [block.code for block in blocks_of(text) if block.language == "python" and not block.file]


def run(guide: Path, names: dict[str, object] | None = None, only: Callable[[str], bool] = bool) -> dict[str, object]:
    """Runs a guide's Python blocks as one program, given names that it takes for granted; gives all names then.

    ``only``: which of the blocks.
    """
    names = {"__name__": "__main__", **(names or {})}
    blocks = [block for block in programs_of(guide.read_text()) if only(block)]
    assert blocks, f"{guide} has no Python"
    for block in blocks:
        exec(compile(block, str(guide), "exec"), names)
    return names


def check_parts(guide: Path) -> None:
    """Blocks that name a file are parts of it, in its order."""
    begins: dict[str, int] = defaultdict(int)
    for block in blocks_of(guide.read_text()):
        if block.file:
            source = _without_indentation((ROOT / block.file).read_text())
            for part in block.code.split("\n\n"):
                begin = source.find(_without_indentation(part), begins[block.file])
                assert begin >= 0, f"{guide.name}: no part of {block.file}, or out of order:\n{part}"
                begins[block.file] = begin


def _without_indentation(source: str) -> str:
    return "\n".join(line.strip() for line in source.strip().splitlines())
