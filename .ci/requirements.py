"""Prints the packages of pyproject.toml's groups, one a line; ``build`` names those that build the package."""

import sys
from pathlib import Path

from pip._vendor import tomli

document = tomli.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
groups = {"build": document["build-system"]["requires"], **document["project"]["optional-dependencies"]}
for group in sys.argv[1:]:
    print("\n".join(groups[group]))
