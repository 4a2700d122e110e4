"""The implementations that scale.py times: on one rank, on several, and the peers on several."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from cases import Case, document_lengths
from job import Job
from measure import ROOT, Call
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import selfattn
from selfattn.distributed import (
    ContextLayout,
    TensorParallel,
    context_parallel_attention,
    parallelize,
    parameter_groups,
)

sys.path.append(str(ROOT.parent / "examples" / "train_packed"))
from model import SwiGlu

HEAVY_TAIL = 1.5
"""Standard deviation of the logarithms of lengths."""


class Ready(NamedTuple):
    """What takes turns: a pass forward and backward over tensors of its own, on every rank that has a part in it."""

    call: Call
    whole: Callable[[], Tensor] | None = None
    """What the call computes, of whole rows, on every rank: the output and the gradient of the first input, the same
    of every contender."""


class Contender(NamedTuple):
    make: Callable[[Job], Ready]
    is_alone: bool = False
    """On the first rank alone; the others wait."""
    work: float = 1.0
    """What all ranks compute in a call, over what one rank does alone."""


@dataclass(frozen=True)
class Row:
    """One row of packed tokens."""

    length: int
    mean: int = 0
    """Of its documents' lengths; 0 is one document."""
    sigma: float = 0.0

    @property
    def name(self) -> str:
        kind = f"docs mean{self.mean}" if self.mean else "one document"
        return f"{kind}{' heavy tail' if self.sigma else ''} S{self.length}"

    def lengths(self) -> list[int]:
        return document_lengths(self.length, self.mean, 0, self.sigma) if self.mean else [self.length]

    def ids(self) -> Tensor:
        """(1, S), on the host."""
        lengths = torch.tensor(self.lengths())
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(torch.int32).unsqueeze(0)

    def document_positions(self) -> Tensor:
        return torch.cat([torch.arange(length) for length in self.lengths()]).unsqueeze(0)


def output_and_gradient(results: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(results[:2], -1)


# ---------------------------------------------------------------- the operator


@dataclass(frozen=True)
class Attention:
    row: Row
    heads: int
    key_heads: int
    dim: int = 128

    @property
    def name(self) -> str:
        return f"{self.row.name} H{self.heads}:{self.key_heads} D{self.dim}"

    def tensors(self, job: Job) -> list[Tensor]:
        """q, k, v and the gradient of the output, of whole rows; the same on every rank."""
        torch.manual_seed(0)
        heads = (self.heads, self.key_heads, self.key_heads, self.heads)
        return [torch.randn(1, self.row.length, n, self.dim, device=job.device, dtype=job.dtype) for n in heads]

    def ids_of_documents(self, job: Job) -> Tensor | None:
        return self.row.ids().to(job.device) if self.row.mean else None


def forward_backward(attend: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> Call:
    for leaf in leaves:
        leaf.requires_grad_()

    def call() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, grad)

    return call


def attention_alone(case: Attention) -> Callable[[Job], Ready]:
    def make(job: Job) -> Ready:
        *leaves, grad = case.tensors(job)
        ids = case.ids_of_documents(job)
        call = forward_backward(lambda q, k, v: selfattn.multihead_attention(q, k, v, ids), leaves, grad)
        return Ready(call, lambda: output_and_gradient(call()))

    return make


def attention_in_context(case: Attention, method: str, heads_size: int = 1) -> Callable[[Job], Ready]:
    """With ``heads_size``, so many ranks next to each other exchange heads, and keys travel between such groups."""

    def make(job: Job) -> Ready:
        mesh = job.mesh
        if heads_size > 1:
            shape = (job.size // heads_size, heads_size)
            pair = init_device_mesh(job.device.type, shape, mesh_dim_names=("keys", "heads"))
            mesh = pair["heads"], pair["keys"]
        layout = ContextLayout.from_segment_ids(case.row.ids(), mesh)
        *leaves, grad = (layout.shard(tensor) for tensor in case.tensors(job))
        call = forward_backward(lambda *qkv: context_parallel_attention(*qkv, layout, method=method), leaves, grad)
        return Ready(call, lambda: layout.unshard(output_and_gradient(call())))

    return make


# ---------------------------------------------------------------- a layer


def layer_call(
    layer: nn.Module, x: Tensor, grad: Tensor, freqs: tuple[Tensor, Tensor], ids: Tensor | None, **context: Any
) -> Call:
    """The layer's output, and the gradients of its input and its parameters, which no rank adds up."""
    leaves = [x.requires_grad_(), *layer.parameters()]

    def call() -> tuple[Tensor, ...]:
        out = layer(x, freqs, ids, **context)
        return out, *torch.autograd.grad(out, leaves, grad)

    return call


@dataclass(frozen=True)
class ContextLayer:
    """A ``SelfAttention`` over one row."""

    row: Row
    embedding_dim: int
    key_heads: int
    dim: int = 128

    @property
    def name(self) -> str:
        heads = self.embedding_dim // self.dim
        return f"{self.row.name} E{self.embedding_dim} H{heads}:{self.key_heads} D{self.dim}"

    def make(self, job: Job, **fields: Any) -> tuple[nn.Module, Tensor, Tensor]:
        """The layer, its input and the gradient of its output."""
        torch.manual_seed(0)
        config = selfattn.SelfAttentionConfig(head_dim=self.dim, num_kv_heads=self.key_heads, **fields)
        layer = selfattn.SelfAttention(self.embedding_dim, config, device=job.device, dtype=job.dtype)
        shape = (1, self.row.length, self.embedding_dim)
        return layer, *(torch.randn(shape, device=job.device, dtype=job.dtype) for _ in range(2))

    def alone(self, job: Job) -> Ready:
        layer, x, grad = self.make(job)
        freqs = selfattn.precompute_freqs(self.dim, self.row.document_positions().to(job.device))
        call = layer_call(layer, x, grad, freqs, self.row.ids().to(job.device) if self.row.mean else None)
        return Ready(call, lambda: output_and_gradient(call()))

    def in_context(self, method: str) -> Callable[[Job], Ready]:
        def make(job: Job) -> Ready:
            layer, x, grad = self.make(job, parallel=selfattn.ParallelConfig(context_method=method))
            layout = ContextLayout.from_segment_ids(self.row.ids(), job.mesh)
            freqs = layout.freqs(self.dim)
            call = layer_call(layer, layout.shard(x), layout.shard(grad), freqs, None, context=layout)
            return Ready(call, lambda: layout.unshard(output_and_gradient(call())))

        return make


@dataclass(frozen=True)
class TensorParallelLayer:
    """A ``SelfAttention`` over a batch, ``attention`` says of which shape and documents."""

    attention: Case
    embedding_dim: int

    @property
    def name(self) -> str:
        case = self.attention
        kind = f"docs mean{case.mean}" if case.mean else "dense causal"
        return f"{kind} S{case.length} B{case.batch} E{self.embedding_dim} D{case.dim}"

    def make(self, job: Job, plan: TensorParallel | None) -> Ready:
        torch.manual_seed(0)
        case = self.attention
        config = selfattn.SelfAttentionConfig(head_dim=case.dim)
        layer = selfattn.SelfAttention(self.embedding_dim, config, device=job.device, dtype=job.dtype)
        shape = (case.batch, case.length, self.embedding_dim)
        x, grad = (torch.randn(shape, device=job.device, dtype=job.dtype) for _ in range(2))
        freqs = selfattn.precompute_freqs(case.dim, max_length=case.length, device=job.device)
        is_sharded = plan is not None and plan.sequence_parallel
        if plan is not None:
            layer = parallelize_module(layer, job.mesh, plan)
        if is_sharded:
            x, grad = (tensor.chunk(job.size, 1)[job.rank].contiguous() for tensor in (x, grad))
        call = layer_call(layer, x, grad, freqs, case.segment_ids(job.device))

        def whole() -> Tensor:
            joined = output_and_gradient(call())
            return all_gather_tensor(joined, 1, job.mesh) if is_sharded else joined

        return Ready(call, whole)

    def alone(self, job: Job) -> Ready:
        return self.make(job, None)

    def spread(self, **options: bool) -> Callable[[Job], Ready]:
        return lambda job: self.make(job, TensorParallel(**options))


# ---------------------------------------------------------------- a training step


class Block(nn.Module):
    """A layer of the demo's model."""

    def __init__(self, width: int, config: selfattn.SelfAttentionConfig) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = selfattn.SelfAttention(width, config)
        self.feed_forward = SwiGlu(width, math.ceil(width * 8 / 3 / 64) * 64)

    def forward(self, x: Tensor, freqs: tuple[Tensor, Tensor], ids: Tensor | None, context: ContextLayout | None):
        x = x + self.attention(self.attention_norm(x), freqs, ids, context=context)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Stack(nn.Module):
    def __init__(self, width: int, layers: int, config: selfattn.SelfAttentionConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, config) for _ in range(layers))

    def forward(
        self, x: Tensor, freqs: tuple[Tensor, Tensor], ids: Tensor | None, context: ContextLayout | None = None
    ):
        for block in self.blocks:
            x = block(x, freqs, ids, context)
        return x


@dataclass(frozen=True)
class Step:
    """A training step of a stack of layers, optimizer included: bfloat16 by autocast on a GPU, weights in float32."""

    embedding_dim: int
    layers: int
    dim: int
    row: Row
    rows: int = 1
    key_heads: int | None = None

    @property
    def name(self) -> str:
        heads = f" H{self.embedding_dim // self.dim}:{self.key_heads}" if self.key_heads else ""
        return f"{self.layers} layers E{self.embedding_dim} D{self.dim}{heads} {self.row.name} B{self.rows}"

    def model(self, job: Job) -> nn.Module:
        torch.manual_seed(0)
        config = selfattn.SelfAttentionConfig(head_dim=self.dim, num_kv_heads=self.key_heads, num_layers=self.layers)
        with job.device:
            return Stack(self.embedding_dim, self.layers, config)

    def ready(self, job: Job, model: nn.Module, layout: ContextLayout | None = None) -> Ready:
        ids = self.row.ids().expand(self.rows, -1)
        x = torch.randn(*ids.shape, self.embedding_dim, device=job.device)
        if layout is None:
            ids = ids.to(job.device).contiguous()
            freqs = selfattn.precompute_freqs(self.dim, self.row.document_positions().to(job.device))
        else:
            x, ids, freqs = layout.shard(x), None, layout.freqs(self.dim)
        optimizer = torch.optim.AdamW(parameter_groups(model.parameters()), lr=1e-5, fused=True)
        elements = self.rows * self.row.length * self.embedding_dim

        def step() -> None:
            with torch.autocast(job.device.type, torch.bfloat16, enabled=job.is_cuda):
                out = model(x, freqs, ids, layout)
            loss = out.float().square().sum() / elements
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return Ready(step)

    def alone(self, job: Job) -> Ready:
        return self.ready(job, self.model(job))

    def spread(
        self, context: int = 1, by_ddp: bool = False, fsdp_modules: Sequence[str] = ("Block",)
    ) -> Callable[[Job], Ready]:
        """Over every rank: ``context`` of them share rows, the others have rows of their own."""

        def make(job: Job) -> Ready:
            fields: dict[str, Any] = {}
            if not by_ddp:
                fields = {
                    "fsdp_modules": fsdp_modules,
                    "fsdp_axis_size": job.size // context,
                    "context_axis_size": context,
                }
            if job.is_cuda and not by_ddp:
                fields |= {"fsdp_gather_dtype": "bfloat16", "fsdp_grad_scatter_dtype": "float32"}
            config = selfattn.ParallelConfig(**fields)
            mesh = config.device_mesh(job.device.type)
            layout = None
            if context > 1:
                layout = config.context_layout(self.row.ids().expand(self.rows, -1), mesh)
            return self.ready(job, parallelize(self.model(job), mesh, config), layout)

        return make
