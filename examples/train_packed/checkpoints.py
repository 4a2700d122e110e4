"""Checkpoints that any number of ranks writes, and any other number goes on from: PyTorch's, a folder for each."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

# Of one process, which is no mistake here.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def latest(folder: Path) -> Path | None:
    """The checkpoint of the last step. The metadata is written last: one that was cut short does not count."""
    return max((metadata.parent for metadata in folder.glob("step_*/.metadata")), default=None)


def save(state: dict[str, Any], folder: Path, step: int) -> None:
    """Called by every rank; a step that is there already stays as it is."""
    path = folder / f"step_{step:08}"
    if latest(folder) != path:
        dcp.save(state, checkpoint_id=path, no_dist=not dist.is_initialized())


def load(state: dict[str, Any], path: Path) -> None:
    """Fills the values of ``state``, which every rank gives with its own shards."""
    dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())


def remove_older(folder: Path) -> None:
    """All but the latest. Called by one process."""
    newest = latest(folder)
    for path in folder.glob("step_*"):
        if path != newest:
            shutil.rmtree(path)
