"""Problems of the CUDA kernels: shapes, patterns of ids, layouts, and who may attend to whom."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One call. ``ids`` names a pattern of :func:`make_ids`."""

    batch: int = 2
    num_queries: int = 300
    num_keys: int = 300
    num_heads: int = 4
    num_kv_heads: int = 2
    dim: int = 128
    value_dim: int = 0  # 0: dim
    dtype: torch.dtype = torch.bfloat16
    ids: str | None = None
    causal: bool = True
    window_left: int = -1
    window_right: int = -1
    has_grad_lse: bool = False
    layout: str = "bsnd"
    scale: float | None = None

    @property
    def options(self) -> dict:
        return {"window_left": self.window_left, "window_right": self.window_right}


def documents(length: int, mean: float) -> Tensor:
    starts = torch.rand(length) < 1 / mean
    return starts.cumsum(0)


def make_ids(kind: str, batch: int, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor | None]:
    """Ids of the queries, and of the keys where they are separate."""
    shape = (batch, num_queries)
    match kind:
        case "packed":
            ids = torch.stack([documents(num_queries, 90) for _ in range(batch)])
        case "long_documents":
            ids = torch.stack([documents(num_queries, 2000) for _ in range(batch)])
            ids[:, -40:] = -1
        case "packed_padded":
            ids = torch.stack([documents(num_queries, 60) for _ in range(batch)])
            ids[:, num_queries - num_queries // 3 :] = -1
            ids[0, : num_queries // 5] = -7
        case "mostly_long_documents":
            ids = torch.zeros(shape, dtype=torch.int64)
            ids[-1] = documents(num_queries, 90)
        case "mostly_short_documents":
            ids = torch.stack([documents(num_queries, 90) for _ in range(batch)])
            ids[0], ids[-1] = 0, 0
        case "short":
            ids = torch.stack([documents(num_queries, 5) for _ in range(batch)])
        case "one_row_general":
            ids = torch.stack([documents(num_queries, 70) for _ in range(batch)])
            ids[0] = ids[0].flip(0)
        case "random":
            ids = torch.randint(-1, 4, shape)
        case "blocks":
            ids = torch.randint(0, 5, (batch, math.ceil(num_queries / 50))).repeat_interleave(50, 1)[:, :num_queries]
        case "distinct":
            ids = torch.stack([torch.randperm(num_queries) for _ in range(batch)])
        case "all_padding":
            ids = torch.full(shape, -1)
            ids[0, :] = 3
        case "separate":
            return torch.randint(-1, 3, shape), torch.randint(-1, 3, (batch, num_keys))
        case "separate_documents":
            return torch.stack([documents(num_queries, 80) for _ in range(batch)]), torch.stack(
                [documents(num_keys, 80) for _ in range(batch)]
            )
    return ids, None


def strided(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "bnsd":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":
        wide = torch.full(
            (*tensor.shape[:3], tensor.shape[3] + 8), float("nan"), dtype=tensor.dtype, device=tensor.device
        )
        wide[..., : tensor.shape[3]] = tensor
        return wide[..., : tensor.shape[3]]
    return tensor


def allowed_pairs(problem: Problem, ids: Tensor | None, key_ids: Tensor | None) -> Tensor:
    i = torch.arange(problem.num_queries, device="cuda")[:, None] + problem.num_keys - problem.num_queries
    j = torch.arange(problem.num_keys, device="cuda")[None, :]
    allowed = torch.ones(problem.batch, problem.num_queries, problem.num_keys, dtype=torch.bool, device="cuda")
    if problem.causal:
        allowed &= j <= i
    if problem.window_left >= 0:
        allowed &= j >= i - problem.window_left
    if problem.window_right >= 0:
        allowed &= j <= i + problem.window_right
    if ids is not None:
        key_ids = ids if key_ids is None else key_ids
        allowed &= (ids[:, :, None] == key_ids[:, None, :]) & (ids >= 0)[:, :, None] & (key_ids >= 0)[:, None, :]
    return allowed[:, None]


def long(queries: int = 2700, keys: int = 0, **fields) -> Problem:
    return replace(Problem(batch=1, num_queries=queries, num_keys=keys or queries), **fields)
