"""A small language model, spread over ranks by ``selfattn.distributed.parallelize`` and held to one process."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from selfattn import ParallelConfig, SelfAttention, SelfAttentionConfig
from selfattn.distributed import ContextLayout, parameter_groups

VOCABULARY, WIDTH, HEAD_DIM, BATCH, LENGTH = 11, 32, 8, 2, 10


class Block(nn.Module):
    def __init__(self, config: SelfAttentionConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, dtype=config._dtype)
        self.attn = SelfAttention(WIDTH, config)
        self.feed_forward = nn.Linear(WIDTH, WIDTH, dtype=config._dtype)

    def forward(self, x: Tensor, segment_ids: Tensor | None, context: ContextLayout | None) -> Tensor:
        x = x + self.attn(self.norm(x), segment_ids=segment_ids, context=context)
        return x + self.feed_forward(x).tanh()


class LanguageModel(nn.Module):
    def __init__(self, config: SelfAttentionConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=config._dtype)
        self.blocks = nn.ModuleList(Block(config) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, dtype=config._dtype)

    def forward(self, tokens: Tensor, segment_ids: Tensor | None, context: ContextLayout | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, segment_ids, context)
        return self.head(x)


def make_model(parallel: ParallelConfig | None = None, dtype: str = "float64", seed: int = 3) -> LanguageModel:
    torch.manual_seed(seed)
    options = {"head_dim": HEAD_DIM, "num_kv_heads": 2, "qk_norm": True, "sinks": True, "dtype": dtype}
    return LanguageModel(SelfAttentionConfig(**options, parallel=parallel or ParallelConfig()))


def make_batch(number: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Tokens and segment ids, other ones for every number, where the model is."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    segment_ids = torch.randint(0, 3, (BATCH, LENGTH), generator=generator).sort(1).values.int()
    return tokens.to(device), segment_ids.to(device)


def loss_of(model: nn.Module, number: int) -> Tensor:
    tokens, segment_ids = make_batch(number, model)
    return nn.functional.cross_entropy(model(tokens, segment_ids).flatten(0, 1).double(), tokens.flatten())


def loss_in_context(model: nn.Module, number: int, mesh: DeviceMesh, config: ParallelConfig) -> Tensor:
    """This rank's part of ``loss_of``: of its tokens, divided by the tokens of all."""
    tokens, segment_ids = make_batch(number, model)
    layout = config.context_layout(segment_ids, mesh, bucket=1)
    logits, labels = model(layout.shard(tokens), None, layout), layout.shard(tokens, -100)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), reduction="sum")
    return losses / tokens.numel()


def data_rank(mesh: DeviceMesh, config: ParallelConfig) -> int:
    """Whose batch this rank computes: ranks of the model axis share one."""
    data, fsdp = (mesh[name] for name in (config.data_axis_name, config.fsdp_axis_name))
    return data.get_local_rank() * fsdp.size() + fsdp.get_local_rank()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model.parameters()), lr=0.05, foreach=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: list[int]) -> None:
    """A step for each batch."""
    for number in numbers:
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()


def train_mean(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    """One step of one process that computes several batches: their losses' mean."""
    optimizer.zero_grad()
    (sum(loss_of(model, number) for number in numbers) / len(numbers)).backward()
    optimizer.step()


def train_alone(ranks: int, steps: range, **options: Any) -> LanguageModel:
    """One process that computes the batches of all ranks."""
    model = make_model(**options)
    optimizer = make_optimizer(model)
    for step in steps:
        train_mean(model, optimizer, range(step * ranks, (step + 1) * ranks))
    return model
