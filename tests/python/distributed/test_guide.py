"""Promise: the program of docs/scale_out.md runs as it stands."""

import re

from support import ROOT
from support.ranks import Ranks


def run_guide() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scale_out.md").read_text(), re.DOTALL)
    assert len(blocks) > 4
    exec(compile("\n".join(blocks), "scale_out.md", "exec"), {"__name__": "__main__"})


def test_program_runs(ranks: Ranks) -> None:
    ranks.run(run_guide, 4)
