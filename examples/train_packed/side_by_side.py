"""The time of a training step with segment ids, and of the same step with the dense mask, on the same rows."""

import statistics
import time
from dataclasses import dataclass

import torch
from dense_mask import DenseMaskModel
from model import LanguageModel
from packing import PackedRows
from torch import nn
from training import backward_step


@dataclass(frozen=True)
class Comparison:
    rows: int
    row_length: int
    segment_ids_seconds: float
    dense_mask_seconds: float
    dense_mask_bytes: int
    loss_difference: float
    """Of the two losses, relative: the two steps compute the same."""


def compare_steps(model: LanguageModel, batch: PackedRows, repeats: int) -> Comparison:
    """Medians of ``repeats`` forward and backward passes; the two take turns, so that a busy machine slows both."""
    contenders = [model, DenseMaskModel(model)]
    targets = batch.count_targets()
    losses = [backward_step(contender, batch, targets).item() for contender in contenders]  # also warms up
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats):
        for contender, times in zip(contenders, seconds, strict=True):
            times.append(_time_step(contender, batch, targets))
    rows, length = batch.tokens.shape
    return Comparison(
        rows=rows,
        row_length=length,
        segment_ids_seconds=statistics.median(seconds[0]),
        dense_mask_seconds=statistics.median(seconds[1]),
        dense_mask_bytes=rows * length * length,
        loss_difference=abs(losses[0] - losses[1]) / losses[1],
    )


def _time_step(model: nn.Module, batch: PackedRows, targets: int) -> float:
    start = time.perf_counter()
    backward_step(model, batch, targets)
    if batch.tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
