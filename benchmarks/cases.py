"""The attention problems that are measured: 16,384 tokens (32,768 in one) and a hidden size of about 2048."""

import math
from dataclasses import dataclass

import measure  # noqa: F401  makes support importable
import torch
from support.problems import names
from torch import Tensor

HIDDEN = 2048
SHORTEST_DOCUMENT = 16
PASSES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One problem. ``mean`` is the mean length of its documents, 0 for dense attention."""

    kind: str  # "causal", "full" or "docs"; documents are causal
    dim: int
    length: int
    batch: int
    mean: int = 0
    value_dim: int | None = None  # None: dim
    num_heads: int | None = None  # None: as many as make the hidden size
    softcap: float = 0.0
    precision: str | None = None  # "tf32" or "ieee": float32, its products so; None: bfloat16
    has_names: bool = False  # documents have numbers in no order (hashes) for ids, not 0, 1, 2, ...

    @property
    def name(self) -> str:
        start = f"docs mean{self.mean}" if self.mean else f"dense {self.kind}"
        dims = f"D{self.dim}" + (f":{self.value_dim}" if self.value_dim else "")
        heads = f" H{self.num_heads}" if self.num_heads else ""
        extras = [f"softcap{self.softcap:g}"] if self.softcap else []
        extras += [f"float32 {self.precision}"] if self.precision else []
        extras += ["hashed ids"] if self.has_names else []
        return " ".join([f"{start} {dims} S{self.length} B{self.batch}{heads}", *extras])

    @property
    def heads(self) -> int:
        return self.num_heads or HIDDEN // self.dim

    @property
    def causal(self) -> bool:
        return self.kind != "full"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision else torch.bfloat16

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
        """Floating-point operations of a pass: 2 for each pair, head and element of a product. Forward has the products
        of scores and of output; backward has, of dimension DQK, scores, dQ and dK, of DV, dP and dV."""
        value_dim = self.value_dim or self.dim
        forward, backward = 2 * (self.dim + value_dim), 2 * (3 * self.dim + 2 * value_dim)
        per_pair = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
        return per_pair[which] * self.heads * self.pairs()

    def tensors(self, device: str = "cuda", dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        shape = (self.batch, self.length, self.heads)
        dims = (self.dim, self.dim, self.value_dim or self.dim)
        return tuple(torch.randn(*shape, dim, device=device, dtype=dtype or self.dtype) for dim in dims)

    def segment_ids(self, device: str = "cuda") -> Tensor | None:
        if not self.mean:
            return None
        rows = [
            torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            for lengths in self.document_lengths()
        ]
        ids = torch.stack(rows)
        return (names(ids) if self.has_names else ids).to(torch.int32).to(device)


def document_lengths(total: int, mean: int, seed: int, sigma: float = 0.0) -> list[int]:
    """Lengths of that mean, at least SHORTEST_DOCUMENT, the last one cut off at ``total``: of an exponential
    distribution, or with ``sigma`` of a lognormal one, which has a heavy tail."""
    generator = torch.Generator().manual_seed(seed)
    lengths, left = [], total
    while left > 0:
        if sigma:
            drawn = torch.empty(1).log_normal_(math.log(mean) - sigma**2 / 2, sigma, generator=generator).item()
        else:
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

FAMILY = [
    Case("causal", 128, 16384, 1),
    Case("full", 128, 16384, 1),
    Case("causal", 64, 16384, 1),
    Case("causal", 256, 16384, 1),
    *(Case("docs", 128, 16384, 1, mean) for mean in (1024, 512, 256)),
    *(Case("docs", 128, 16384, 1, 64, has_names=has_names) for has_names in (False, True)),
    *(Case("causal", dim, 16384, 1) for dim in (96, 192, 100)),
    Case("causal", 192, 16384, 1, value_dim=128),
    Case("causal", 128, 16384, 1, softcap=30.0),
    *(Case("docs", 64, 16384, 1, 1024, precision=precision) for precision in ("tf32", "ieee")),
]
"""What two families of CUDA kernels are compared by."""

MEMORY = [
    Case("causal", 128, 8192, 1, num_heads=16),
    Case("causal", 128, 8192, 1, num_heads=16, softcap=30.0),
    Case("causal", 100, 8192, 1, num_heads=16),
    Case("causal", 128, 8192, 1, num_heads=16, precision="ieee"),
    *(Case("docs", dim, 8192, 1, 1024, num_heads=16) for dim in (128, 100)),
    Case("docs", 128, 8192, 1, 1024, num_heads=16, softcap=30.0),
    Case("docs", 128, 8192, 1, 1024, num_heads=16, precision="ieee"),
]
"""What is looked at for its memory: what is composed of other operators takes a multiple of what kernels take."""

SETS = {"usual": CASES, "family": FAMILY, "memory": MEMORY}
