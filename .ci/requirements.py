"""Prints the packages of pyproject.toml's groups, one a line; ``torch`` names the dependencies themselves."""

import sys
from pathlib import Path

from pip._vendor import tomli

project = tomli.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
groups = {"torch": project["dependencies"], **project["optional-dependencies"]}
for group in sys.argv[1:]:
    print("\n".join(groups[group]))
