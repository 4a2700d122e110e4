"""Promise: the README's Python lines run as they stand.

Those of other libraries run in tests/integrations/test_readme_integrations.py.
"""

import re

from support import ROOT
from support.guides import programs_of


def test_python_lines_run() -> None:
    text = (ROOT / "README.md").read_text()
    own, cuts = re.subn(r"^## Use it in other libraries\n.*?(?=^### A plain loop)", "", text, flags=re.DOTALL | re.M)
    assert cuts == 1
    blocks = programs_of(own)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_names_of_files_exist() -> None:
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not missing
