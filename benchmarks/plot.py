"""Draws the rows that attention.py wrote: one bar chart a pass, cases along the axis, one colour an implementation."""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"


def read_rows(path: Path, which: str) -> dict[str, dict[str, float]]:
    """case -> implementation -> TFLOP/s, the median where a case was measured more than once."""
    speeds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["pass"] == which:
            speeds[row["case"]][row["impl"]].append(row["tflops"])
    return {case: {impl: statistics.median(v) for impl, v in impls.items()} for case, impls in speeds.items()}


def draw(speeds: dict[str, dict[str, float]], title: str, path: Path) -> None:
    implementations = list(dict.fromkeys(impl for impls in speeds.values() for impl in impls))
    width = 0.8 / len(implementations)
    figure, axes = plt.subplots(figsize=(max(6, 0.9 * len(speeds)), 5), layout="constrained")
    for index, implementation in enumerate(implementations):
        places = [at for at, impls in enumerate(speeds.values()) if implementation in impls]
        heights = [impls[implementation] for impls in speeds.values() if implementation in impls]
        bars = axes.bar([at + (index - (len(implementations) - 1) / 2) * width for at in places], heights, width)
        bars.set_label(implementation)
        axes.bar_label(bars, fmt="%.0f", fontsize=7, rotation=90, padding=2)
    axes.set_xticks(range(len(speeds)), speeds, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.margins(x=0.02, y=0.18)
    axes.set_ylabel("TFLOP/s of allowed pairs")
    axes.set_title(title)
    axes.legend(loc="upper left", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=RESULTS / "attention_h100.jsonl")
    parser.add_argument(
        "--out", type=Path, default=RESULTS.parents[1] / "docs" / "figures", help="folder of the pictures"
    )
    arguments = parser.parse_args()
    for which in ("forward", "backward"):
        speeds = read_rows(arguments.rows, which)
        if speeds:
            draw(speeds, f"Attention {which}, bfloat16", arguments.out / f"attention_{which}.png")


if __name__ == "__main__":
    main()
