"""The attention problems that are measured: 16,384 tokens (32,768 in one) and a hidden size of 2048."""

from dataclasses import dataclass

import torch
from torch import Tensor

HIDDEN = 2048
SHORTEST_DOCUMENT = 16
FLOPS_PER_PAIR = {"forward": 4, "backward": 10, "forward+backward": 14}


@dataclass(frozen=True)
class Case:
    """One problem. ``mean`` is the mean length of its documents, 0 for dense attention."""

    kind: str  # "causal", "full" or "docs"; documents are causal
    dim: int
    length: int
    batch: int
    mean: int = 0

    @property
    def name(self) -> str:
        start = f"docs mean{self.mean}" if self.mean else f"dense {self.kind}"
        return f"{start} D{self.dim} S{self.length} B{self.batch}"

    @property
    def heads(self) -> int:
        return HIDDEN // self.dim

    @property
    def causal(self) -> bool:
        return self.kind != "full"

    def document_lengths(self) -> list[list[int]]:
        """The documents of every row; the whole row where attention is dense."""
        if not self.mean:
            return [[self.length]] * self.batch
        return [document_lengths(self.length, self.mean, seed=row) for row in range(self.batch)]

    def pairs(self) -> float:
        """Allowed (query, key) pairs of one head, over the batch; a causal document of n tokens counts n * n / 2."""
        pairs = sum(n * n for row in self.document_lengths() for n in row)
        return pairs / 2 if self.causal else pairs

    def flops(self, which: str) -> float:
        """Floating-point operations of a pass, FLOPS_PER_PAIR for each pair, head and dimension."""
        return FLOPS_PER_PAIR[which] * self.dim * self.heads * self.pairs()

    def tensors(self, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
        shape = (self.batch, self.length, self.heads, self.dim)
        return tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(3))

    def segment_ids(self, device: str = "cuda") -> Tensor | None:
        if not self.mean:
            return None
        rows = [
            torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            for lengths in self.document_lengths()
        ]
        return torch.stack(rows).to(torch.int32).to(device)


def document_lengths(total: int, mean: int, seed: int) -> list[int]:
    """Lengths drawn from an exponential distribution, at least SHORTEST_DOCUMENT, the last one cut off at ``total``."""
    generator = torch.Generator().manual_seed(seed)
    lengths, left = [], total
    while left > 0:
        drawn = torch.empty(1).exponential_(1 / mean, generator=generator).item()
        length = int(min(left, max(SHORTEST_DOCUMENT, drawn)))
        lengths.append(length)
        left -= length
    return lengths


DENSE = [
    Case(kind, dim, length, 16384 // length)
    for dim in (128, 64, 256)
    for kind in ("causal", "full")
    for length in (16384, 4096, 1024)
]
DOCUMENTS = [
    Case("docs", 128, 16384, 1, 1024),
    Case("docs", 128, 8192, 2, 512),
    Case("docs", 128, 16384, 1, 256),
    Case("docs", 64, 16384, 1, 1024),
    Case("docs", 128, 32768, 1, 4096),
]
CASES = [*DENSE, *DOCUMENTS]
