"""Draws the rows that the benchmarks wrote: one bar chart a pass, cases along the axis, one colour an implementation.

python benchmarks/plot.py --rows benchmarks/results/attention_h100.jsonl benchmarks/results/module_h100.jsonl
"""

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
Values = dict[str, dict[str, float]]  # case -> implementation -> value


@dataclass(frozen=True)
class Chart:
    """What is drawn of a benchmark's rows; the rows are known by the field ``mark``."""

    benchmark: str
    title: str
    mark: str
    field: str
    label: str
    digits: int = 0


CHARTS = [
    Chart("attention", "Attention", "tflops", "tflops", "TFLOP/s of allowed pairs"),
    Chart("qk_norm_rope", "qk_norm_rope", "gbps", "gbps", "GB/s"),
    Chart("module", "Module", "tokens_per_s", "ms", "milliseconds (less is better)", digits=1),
]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def values_of(rows: list[dict[str, Any]], chart: Chart, which: str) -> Values:
    """The values of a pass, the median where a case was measured more than once."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if chart.mark in row and row["pass"] == which:
            values[row["case"]][row["impl"]].append(row[chart.field])
    return {case: {impl: statistics.median(v) for impl, v in impls.items()} for case, impls in values.items()}


def draw(values: Values, chart: Chart, title: str, path: Path) -> None:
    implementations = list(dict.fromkeys(impl for impls in values.values() for impl in impls))
    most = max(map(len, values.values()))
    width = 0.8 / most
    figure, axes = plt.subplots(figsize=(max(6, (0.3 + 0.2 * most) * len(values)), 5), layout="constrained")
    for implementation in implementations:
        places, heights = [], []
        for at, impls in enumerate(values.values()):
            if implementation in impls:  # the bars of a case stand side by side, without gaps for absent ones
                places.append(at + (list(impls).index(implementation) - (len(impls) - 1) / 2) * width)
                heights.append(impls[implementation])
        bars = axes.bar(places, heights, width, label=implementation)
        axes.bar_label(bars, fmt=f"%.{chart.digits}f", fontsize=7, rotation=90, padding=2)
    axes.set_xticks(range(len(values)), values, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.margins(x=0.02, y=0.15)
    axes.set_ylabel(chart.label)
    axes.set_title(title)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_all(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """One picture for each benchmark and pass that the rows hold."""
    drawn = []
    for chart in CHARTS:
        for which in dict.fromkeys(row["pass"] for row in rows if chart.mark in row):
            path = folder / f"{chart.benchmark}_{which.replace('+', '_').replace(' ', '_')}.png"
            draw(values_of(rows, chart, which), chart, f"{chart.title} {which}, bfloat16", path)
            drawn.append(path)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, nargs="+", default=[RESULTS / "attention_h100.jsonl"])
    parser.add_argument(
        "--out", type=Path, default=RESULTS.parents[1] / "docs" / "figures", help="folder of the pictures"
    )
    arguments = parser.parse_args()
    for path in draw_all([row for file in arguments.rows for row in read_rows(file)], arguments.out):
        print(path)


if __name__ == "__main__":
    main()
