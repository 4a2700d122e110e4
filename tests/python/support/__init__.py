"""What the tests share, and some of it the benchmarks: problems, oracles, the serving table, programs to run."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
"""The project's folder."""
