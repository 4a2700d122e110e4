"""How much a run trains, by the machine it is meant for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    embedding_dim: int
    num_layers: int
    head_dim: int
    row_length: int
    rows_per_step: int
    steps: int
    learning_rate: float
    bound: float
    """Held-out bits per byte, on the Python standard library, that a run must fall below."""
    evaluate_every: int
    held_out_rows: int
    long_rows: tuple[int, int]
    """(rows, length) of the longer rows on which the step is also compared with the dense mask."""
    comparison_repeats: int
    loss_tolerance: float
    """Between the two ways to attend: of their arithmetic's precision."""


PRESETS = {
    # Two CPU cores, under five minutes.
    "small": Preset(
        embedding_dim=128,
        num_layers=4,
        head_dim=32,
        row_length=1024,
        rows_per_step=1,
        steps=1000,
        learning_rate=3e-3,
        bound=3.2,
        evaluate_every=200,
        held_out_rows=32,
        long_rows=(1, 4096),
        comparison_repeats=5,
        loss_tolerance=1e-4,
    ),
    # One GPU, a few minutes.
    "large": Preset(
        embedding_dim=512,
        num_layers=8,
        head_dim=64,
        row_length=2048,
        rows_per_step=16,
        steps=1500,
        learning_rate=2e-3,
        bound=2.5,
        evaluate_every=250,
        held_out_rows=128,
        long_rows=(2, 8192),
        comparison_repeats=10,
        loss_tolerance=1e-2,
    ),
    # A few seconds: for tests of the program itself.
    "tiny": Preset(
        embedding_dim=32,
        num_layers=2,
        head_dim=16,
        row_length=128,
        rows_per_step=4,
        steps=12,
        learning_rate=1e-2,
        bound=8.0,
        evaluate_every=4,
        held_out_rows=8,
        long_rows=(1, 256),
        comparison_repeats=2,
        loss_tolerance=1e-4,
    ),
}
