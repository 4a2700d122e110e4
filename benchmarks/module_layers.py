"""The implementations that module.py times: SelfAttention, and the same layer in plain PyTorch over its parameters."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import Case
from measure import synchronise
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from selfattn import SelfAttention, SelfAttentionConfig, precompute_freqs

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, N, S, D) each


@dataclass(frozen=True)
class ModuleCase:
    """A layer and its input; ``attention`` names batch, length, head dimension and documents."""

    attention: Case
    embedding_dim: int
    qk_norm: bool

    @property
    def name(self) -> str:
        shape = f"E{self.embedding_dim} D{self.attention.dim} S{self.attention.length} B{self.attention.batch}"
        start = f"docs mean{self.attention.mean}" if self.attention.mean else f"dense {self.attention.kind}"
        return f"{start} {shape}" + (" qk_norm" if self.qk_norm else "")

    @property
    def tokens(self) -> int:
        return self.attention.batch * self.attention.length


class Problem:
    """The tensors of a case: one layer, whose parameters all implementations share, its input and its rotary tables."""

    def __init__(self, case: ModuleCase, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        config = SelfAttentionConfig(head_dim=case.attention.dim, qk_norm=case.qk_norm, causal=case.attention.causal)
        shape = (case.attention.batch, case.attention.length, case.embedding_dim)
        self.case, self.device = case, device
        self.layer = SelfAttention(case.embedding_dim, config, device=device, dtype=dtype)
        self.x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        self.grad = torch.randn(shape, device=device, dtype=dtype)
        self.ids = case.attention.segment_ids(device)
        self.freqs = precompute_freqs(case.attention.dim, None, case.attention.length, dtype=dtype, device=device)
        self.leaves = [self.x, *self.layer.parameters()]


class PlainLayer(nn.Module):
    """The layer as a PyTorch user writes it, for eager mode and for torch.compile; ``attend`` is its attention."""

    def __init__(self, problem: Problem, attend: Attend) -> None:
        super().__init__()
        layer = problem.layer
        self.head_dim, self.attend = layer.head_dim, attend
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj
        self.q_norm = layer.q_norm or nn.Identity()
        self.k_norm = layer.k_norm or nn.Identity()
        self.sin, self.cos = (table.unsqueeze(2) for table in problem.freqs)  # (1, S, 1, D / 2), the dtype of x

    def rotate(self, x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * self.cos - odd * self.sin, even * self.sin + odd * self.cos), -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in projections)
        q, k = self.rotate(self.q_norm(q)), self.rotate(self.k_norm(k))
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out_proj(out.transpose(1, 2).flatten(-2))


@dataclass(frozen=True)
class Implementation:
    forward: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    computes_the_layer: bool = True
    mask_ms: float | None = None  # milliseconds to build the mask of a batch, no part of the times


def timed(build: Callable[[], Tensor | BlockMask], repeats: int = 5) -> tuple[Tensor | BlockMask, float]:
    """What ``build`` gives, and the median of its milliseconds after a first call."""
    built = build()
    times = []
    for _ in range(repeats):
        synchronise()
        start = time.perf_counter()
        built = build()
        synchronise()
        times.append(1e3 * (time.perf_counter() - start))
    return built, statistics.median(times)


def maybe_compiled(module: nn.Module, is_compiled: bool) -> Callable[[Tensor], Tensor]:
    return torch.compile(module, fullgraph=True, dynamic=False) if is_compiled else module


def ours(problem: Problem, is_compiled: bool = False, has_tables: bool = False) -> Implementation:
    freqs = problem.freqs if has_tables else None
    layer = maybe_compiled(problem.layer, is_compiled)
    return Implementation(lambda x: layer(x, freqs, problem.ids))


def flex(problem: Problem) -> Implementation | None:
    """FlexAttention inside the compiled layer, with its block mask made beforehand."""
    ids, attention = problem.ids, problem.case.attention
    if ids is None:
        return None

    def is_allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (ids[b, i] == ids[b, j])

    shape = (attention.batch, None, attention.length, attention.length)
    on_gpu = problem.device == "cuda"
    mask, mask_ms = timed(lambda: create_block_mask(is_allowed, *shape, device=problem.device, _compile=on_gpu))
    plain = PlainLayer(problem, lambda q, k, v: flex_attention(q, k, v, block_mask=mask))
    return Implementation(maybe_compiled(plain, True), mask_ms=mask_ms)


def sdpa_mask(problem: Problem, is_compiled: bool = False) -> Implementation | None:
    """SDPA with a dense boolean mask made beforehand; PyTorch chooses between cuDNN and the memory-efficient kernel."""
    ids, length = problem.ids, problem.case.attention.length
    if ids is None:
        return None

    def build() -> Tensor:
        earlier = torch.ones(length, length, dtype=torch.bool, device=problem.device).tril()
        return (ids[:, None, :, None] == ids[:, None, None, :]) & earlier

    mask, mask_ms = timed(build)
    plain = PlainLayer(problem, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    return Implementation(under(problem, backends, maybe_compiled(plain, is_compiled)), mask_ms=mask_ms)


def sdpa_cudnn(problem: Problem, is_compiled: bool = False) -> Implementation | None:
    if problem.ids is not None:
        return None
    causal = problem.case.attention.causal
    plain = PlainLayer(problem, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    return Implementation(under(problem, [SDPBackend.CUDNN_ATTENTION], maybe_compiled(plain, is_compiled)))


def under(
    problem: Problem, backends: list[SDPBackend], layer: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The layer with SDPA held to these backends, on a GPU."""

    def chosen() -> AbstractContextManager[None]:
        return sdpa_kernel(backends) if problem.device == "cuda" else nullcontext()

    def forward(x: Tensor) -> Tensor:
        with chosen():
            return layer(x)

    return forward


def projections(problem: Problem) -> Implementation:
    """The four projections alone, the floor of every implementation: the output projection takes the query's."""
    layer = problem.layer

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        return layer.out_proj(layer.q_proj(x)), layer.k_proj(x), layer.v_proj(x)

    return Implementation(forward, computes_the_layer=False)


OURS = "selfattn"
FLOOR = "projections"
IMPLEMENTATIONS: dict[str, Callable[[Problem], Implementation | None]] = {
    OURS: ours,  # computes its rotary angles itself
    "selfattn_tables": lambda problem: ours(problem, has_tables=True),
    "selfattn_compiled": lambda problem: ours(problem, is_compiled=True),
    "flex_compiled": flex,
    "sdpa_mask": sdpa_mask,
    "sdpa_mask_compiled": lambda problem: sdpa_mask(problem, is_compiled=True),
    "sdpa_cudnn": sdpa_cudnn,
    "sdpa_cudnn_compiled": lambda problem: sdpa_cudnn(problem, is_compiled=True),
    FLOOR: projections,
}
