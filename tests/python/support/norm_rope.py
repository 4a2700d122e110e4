"""Calls of qk_norm_rope that its tests share, their results in float64, and the same formula in their precision."""

import itertools
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from support import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (2, 6, 8, 16, 40, 64, 80, 96, 128, 192, 256, 272)
PAIRINGS = ("interleaved", "half")
SOURCES = ("tables", "tables_of_rows", "bfloat16_tables", "positions", "positions_of_rows", "nothing")
LAYOUTS = ("contiguous", "packed", "heads_first", "misaligned", "strided_last", "expanded")
EPS, THETA = 1e-3, 500.0


@dataclass(frozen=True)
class NormRopeCase:
    dtype: torch.dtype = torch.float32
    dim: int = 64
    pairing: str = "interleaved"
    norm: bool = True
    weights: str | None = "float32"  # dtype of both weights, or None
    source: str | None = "nothing"  # of the angles; None: no rotation
    heads: int = 4
    kv_heads: int = 2
    batch: int = 2
    length: int = 7
    layout: str = "contiguous"
    rotary_dim: int | None = None  # of tables; None: dim
    factor: float = 1.0  # of tables

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"d{self.dim}", self.pairing, self.source or "no_rope"]
        parts += ["norm" if self.norm else "no_norm", f"w_{self.weights}" if self.norm and self.weights else "no_w"]
        parts += [f"r{self.rotary_dim}"] * (self.rotary_dim is not None) + [f"by{self.factor}"] * (self.factor != 1)
        return "-".join([*parts, f"{self.heads}x{self.kv_heads}", f"{self.batch}x{self.length}", self.layout])

    def heads_tensor(self, heads: int, device: str) -> Tensor:
        """(B, S, heads, D) in the case's layout, of size 1."""
        shape = (self.batch, self.length, heads, self.dim)
        random_like = lambda *sizes: torch.randn(sizes, dtype=torch.float64).to(device, self.dtype)  # noqa: E731
        if self.layout == "packed":  # a view of a projection of more heads
            return random_like(self.batch, self.length, heads + 3, self.dim)[:, :, 1 : heads + 1]
        if self.layout == "heads_first":
            return random_like(self.batch, heads, self.length, self.dim).transpose(1, 2)
        if self.layout == "misaligned":
            return random_like(self.batch, self.length, heads, self.dim + 1)[..., 1:]
        if self.layout == "strided_last":
            return random_like(self.batch, self.length, heads, 2 * self.dim)[..., ::2]
        if self.layout == "expanded":
            return random_like(self.batch, 1, heads, self.dim).expand(shape)
        return random_like(*shape)

    def angles(self, device: str) -> tuple[dict[str, Tensor], Tensor]:
        """The arguments that say the angles, and the positions that they stand for."""
        rows = torch.randint(0, 5000, (self.batch, self.length))
        if self.source == "nothing":
            return {}, torch.arange(self.length)[None]
        positions = rows if self.source.endswith("of_rows") else rows[:1]
        if self.source.startswith("positions"):
            return {"positions": positions.to(device)}, positions
        sin, cos = reference.rotary_frequencies(self.rotary_dim or self.dim, positions, THETA)
        sin, cos = sin * self.factor, cos * self.factor
        dtype = torch.bfloat16 if self.source == "bfloat16_tables" else torch.float32
        return {"freqs_sin": sin.to(device, dtype), "freqs_cos": cos.to(device, dtype)}, positions

    def make(self, device: str = "cpu") -> tuple[dict, tuple[Tensor, Tensor] | None]:
        """Arguments of qk_norm_rope, and the sines and cosines that they mean."""
        arguments = {
            "q": self.heads_tensor(self.heads, device),
            "k": self.heads_tensor(self.kv_heads, device),
            "norm": self.norm,
            "eps": EPS,
            "rope": self.source is not None,
            "theta": THETA,
            "pairing": self.pairing,
        }
        if self.norm and self.weights:
            for name in ("q_weight", "k_weight"):
                arguments[name] = (1 + torch.randn(self.dim)).to(device, getattr(torch, self.weights))
        if self.source is None:
            return arguments, None
        angles, positions = self.angles(device)
        arguments |= angles
        if "freqs_sin" in angles:
            return arguments, (angles["freqs_sin"].cpu().double(), angles["freqs_cos"].cpu().double())
        return arguments, reference.rotary_frequencies(self.dim, positions, THETA)

    def with_(self, **changes) -> "NormRopeCase":
        return replace(self, **changes)


def expected(arguments: dict, tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """q and k in float64 on the CPU, differentiable."""
    results = []
    for name in ("q", "k"):
        x = arguments[name].cpu().double()
        if arguments["norm"]:
            weight = arguments.get(f"{name}_weight")
            x = reference.rms_norm(x, None if weight is None else weight.cpu(), arguments["eps"])
        results.append(x if tables is None else reference.rotate(x, *tables, arguments["pairing"]))
    return tuple(results)


def in_own_precision(arguments: dict, tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The formula in float32 PyTorch operators with one rounding at the end: whose error the kernels may double."""
    results = []
    for name in ("q", "k"):
        x = arguments[name].float()
        if arguments["norm"]:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + arguments["eps"])
            weight = arguments.get(f"{name}_weight")
            x = x if weight is None else x * weight.float()
        if tables is not None:
            sin, cos = (table.to(x.device, torch.float32)[:, :, None] for table in tables)
            x, rest = x.split([2 * sin.shape[-1], x.shape[-1] - 2 * sin.shape[-1]], -1)
            if arguments["pairing"] == "interleaved":
                first, second = x[..., ::2], x[..., 1::2]
                x = torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(3)
            else:
                first, second = x.chunk(2, -1)
                x = torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
            x = torch.cat([x, rest], -1)
        results.append(x.to(arguments[name].dtype))
    return tuple(results)


def generated_cases() -> list[NormRopeCase]:
    """Every dtype, dimension and pairing with what else there is, drawn so that each value of each choice is met."""
    generator = random.Random(7)
    cases = []
    for dtype, dim, pairing in itertools.product(DTYPES, DIMS, PAIRINGS):
        pick = generator.choice
        cases.append(
            NormRopeCase(
                dtype,
                dim,
                pairing,
                norm=pick([True, True, True, False]),
                weights=pick(["float32", "float32", "bfloat16", "float64", None]),
                source=pick([*SOURCES, None]),
                heads=pick([1, 4, 6, 17]),
                kv_heads=pick([1, 2, 4]),
                batch=pick([1, 2, 3]),
                length=pick([1, 5, 33, 70]),
                layout=pick(LAYOUTS),
            )
        )
    base = NormRopeCase(length=33)
    for norm, source in itertools.product((True, False), (*SOURCES, None)):
        cases += [base.with_(norm=norm, source=source), base.with_(norm=norm, source=source, dtype=torch.bfloat16)]
    for layout in LAYOUTS:
        cases += [base.with_(dtype=torch.bfloat16, dim=128, layout=layout), base.with_(dim=40, layout=layout)]
    cases += [
        base.with_(dtype=torch.bfloat16, dim=128, heads=40, kv_heads=8, length=300),
        base.with_(dtype=torch.bfloat16, dim=64, heads=40, kv_heads=8, length=300, pairing="half"),
        base.with_(dim=7, source=None),  # without rotation it may be odd
        base.with_(dim=1, source=None),
    ]
    # (D, R): vector kernels and general ones, as wide as the head, a few elements, half of them, odd heads
    for (dim, rotary_dim), pairing, dtype in itertools.product(
        (
            (64, 2),
            (64, 64),
            (96, 48),
            (128, 64),
            (128, 96),
            (128, 126),
            (256, 64),
            (40, 24),
            (272, 128),
            (7, 4),
            (3, 2),
        ),
        PAIRINGS,
        DTYPES,
    ):
        cases.append(
            NormRopeCase(
                dtype,
                dim,
                pairing,
                norm=generator.choice([True, True, False]),
                weights=generator.choice(["float32", "bfloat16", None]),
                source=generator.choice(["tables", "tables_of_rows", "bfloat16_tables"]),
                heads=generator.choice([1, 4, 17]),
                kv_heads=generator.choice([1, 2]),
                length=generator.choice([1, 5, 33]),
                layout=generator.choice(LAYOUTS),
                rotary_dim=rotary_dim,
                factor=generator.choice([1.0, 1.25]),
            )
        )
    return list(dict.fromkeys(cases))


CASES = generated_cases()
