"""What a run leaves behind: a record that programs read, and a picture of the loss for people."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from training import History


def write_record(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n")


def plot_loss(path: Path, history: History, bound: float) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(history.bits_per_byte) + 1), history.bits_per_byte, linewidth=0.8, label="training")
    steps, bits = zip(*history.held_out, strict=True)
    axes.plot(steps, bits, marker="o", label="held out")
    axes.axhline(bound, color="grey", linestyle="--", label=f"bound {bound:g}")
    axes.set(xlabel="step", ylabel="bits per byte", title="Packed documents, one attention per document", ylim=(0, 8.5))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
