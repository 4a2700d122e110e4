"""Promise: the program of docs/distributed.md runs as it stands."""

from support import ROOT
from support.guides import run
from support.ranks import Ranks


def run_guide() -> None:
    run(ROOT / "docs" / "distributed.md")


def test_program_runs(ranks: Ranks) -> None:
    ranks.run(run_guide, 4)
