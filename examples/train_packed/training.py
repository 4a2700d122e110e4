"""The training loop: it can be interrupted at any step, and goes on later as if nothing had happened."""

import math
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
import torch
import torch.nn.functional as F
from packing import IGNORED_TARGET, PackedRows
from parallel import OneProcess
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

NATS_PER_BIT = math.log(2)
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
"""The optimizer's state by the parameters' names: its groups differ with the ranks."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a run computes."""

    seed: int
    steps: int
    rows_per_step: int
    row_length: int
    embedding_dim: int
    num_layers: int
    head_dim: int
    attention_backend: str
    data: str
    learning_rate: float = 4e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1

    @property
    def hidden_dim(self) -> int:
        """Of SwiGLU: 8/3 of the embedding, as in Llama, in multiples of 64."""
        return math.ceil(self.embedding_dim * 8 / 3 / 64) * 64

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, and a cosine down to a tenth."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warmup * (0.55 + 0.45 * math.cos(math.pi * step / self.steps))


@dataclass
class History:
    """What was measured: at each step, and the held-out loss at some."""

    bits_per_byte: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


class Trainer:
    """A model, its optimizer and how far they are: what a checkpoint holds. Every rank has one, and the same rows."""

    def __init__(self, plan: Plan, model: nn.Module, rows: PackedRows, ranks: OneProcess) -> None:
        self.plan = plan
        self.model = ranks.spread(model.to(ranks.device))
        self.history = History()
        self.step = 0
        self._rows = rows
        self._ranks = ranks
        self._optimizer = torch.optim.AdamW(
            ranks.parameter_groups(self.model),
            lr=plan.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=plan.weight_decay,
        )

    def train_one_step(self) -> None:
        start = time.perf_counter()
        for group in self._optimizer.param_groups:
            group["lr"] = self.plan.learning_rate_at(self.step)
        batch = self._batch()
        ranks = self._ranks
        loss = backward_step(self.model, ranks.share(batch), batch.count_targets() / ranks.data_ranks)
        ranks.clip_gradients(self.model, 1.0)
        self._optimizer.step()
        loss = ranks.sum(loss) / ranks.data_ranks
        self.history.bits_per_byte.append(loss.item())  # waits for the device, so the time below is whole
        self.history.seconds.append(time.perf_counter() - start)
        self.step += 1

    def evaluate(self, held_out: PackedRows) -> float:
        bits = held_out_bits(self.model, held_out, self.plan.rows_per_step, self._ranks)
        self.history.held_out.append((self.step, bits))
        return bits

    def save(self, folder: Path) -> None:
        """Any number of ranks goes on from it."""
        checkpoints.save(self._state(), folder, self.step)
        self._ranks.on_first(lambda: checkpoints.remove_older(folder))

    def load(self, path: Path) -> None:
        """Raises SystemExit where the checkpoint is of a run with another plan."""
        mine = asdict(self.plan)
        saved = {"plan": dict(mine)}
        checkpoints.load(saved, path)
        different = [name for name in mine if saved["plan"][name] != mine[name]]
        if different:
            raise SystemExit(
                f"{path} is of a run with another {', '.join(different)}. Start anew with --fresh, or choose another "
                "folder with --out."
            )
        state = self._state()
        checkpoints.load(state, path)
        set_state_dict(
            self.model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=BY_NAME,
        )
        self.step = state["step"]
        self.history = History(**state["history"])

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self._optimizer, options=BY_NAME)
        return {
            "plan": asdict(self.plan),
            "step": self.step,
            "model": model,
            "optimizer": optimizer,
            "history": asdict(self.history),
        }

    def _batch(self) -> PackedRows:
        """Of the step's number alone: a resumed run sees the rows that it would have seen."""
        per_epoch = len(self._rows) // self.plan.rows_per_step
        epoch, index = divmod(self.step, per_epoch)
        order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(self.plan.seed + epoch))
        return self._rows[order[index * self.plan.rows_per_step :][: self.plan.rows_per_step]]


def backward_step(model: nn.Module, batch: PackedRows, targets: float) -> Tensor:
    """Fresh gradients of the loss, which is returned without its graph; ``targets`` as in ``loss_in_bits``."""
    model.zero_grad(set_to_none=True)
    loss = loss_in_bits(model, batch, targets)
    (loss * NATS_PER_BIT).backward()
    return loss.detach()


def logits_of(model: nn.Module, batch: PackedRows) -> Tensor:
    """(B, S, vocabulary); a GPU computes in bfloat16 where it can."""
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=batch.tokens.is_cuda):
        return model(batch.tokens, batch.segment_ids, batch.positions, context=batch.context)


def loss_in_bits(model: nn.Module, batch: PackedRows, targets: float) -> Tensor:
    """Bits per byte: the sum over the batch, divided by ``targets``, which are ``batch.count_targets()`` for the mean.
    The end of a document counts as a byte, padding does not count."""
    logits = logits_of(model, batch).flatten(0, 1)
    nats = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
    return nats / targets / NATS_PER_BIT


@torch.no_grad()
def held_out_bits(model: nn.Module, rows: PackedRows, rows_per_step: int, ranks: OneProcess) -> float:
    total = sum(
        loss_in_bits(model, ranks.share(rows[start : start + rows_per_step]), 1).item()
        for start in range(0, len(rows), rows_per_step)
    )
    return ranks.sum(torch.tensor(total, dtype=torch.float64)).item() / rows.count_targets()


@contextmanager
def interruptible():
    """Yields a function that says whether the user (Ctrl-C) or the system (SIGTERM) asked to stop: the step at hand
    is finished first. A second Ctrl-C stops at once."""
    stop_signals = (signal.SIGINT, signal.SIGTERM)
    asked = False

    def ask(signal_number: int, _frame) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal_number, previous[signal_number])

    previous = {number: signal.signal(number, ask) for number in stop_signals}
    is_stop_asked: Callable[[], bool] = lambda: asked  # noqa: E731
    try:
        yield is_stop_asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
