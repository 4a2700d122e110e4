"""Times a stack of attention layers that decodes on CUDA, one token of every row a step, beside it in plain PyTorch.

    python benchmarks/decode_stack.py --out benchmarks/results/decode_h200.jsonl
    python benchmarks/decode_stack.py --case "B1 " --impl selfattn --impl filled_cudnn

Layers with rotary embedding and residual connections, no MLP; random weights, caches filled with random keys and
values, all in bfloat16. Every step is one replayed CUDA graph. ``ms``: of a step, the median of rounds in which the
implementations take turns; a turn is ``--steps`` steps one after the other, whose last one fills the cache.
``tokens_per_s``: of all rows together. L2 is not flushed: the weights of all layers and their caches, ``mb``, pass
through it in every step. ``share``: of the bandwidth of ``copy``, which moves as many bytes. ``host_us``: until a step
in eager mode returns, from Python.

``selfattn`` has a dense KVCache, ``selfattn_pages`` one in pages of 64 in random order. The others have the same
weights, rotate by ATen's operators (tables are made once a step) and write with index_copy_ into a static cache, as
that of transformers lies. ``static_*`` see its filled slots by a mask, made once a step; ``static_repeat`` repeats keys
and values for every query head, as transformers does beside a mask, and leaves the choice of a kernel to PyTorch.
``filled_*`` have no mask and no length that grows: every step writes the last slot and sees all, so another length
would need another graph. The output of each, and what it wrote, are compared with ours before it is timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from decode import PAGE, Call, as_graph, copy_of
from measure import add_record_options, describe_run, host_time, parse_with_tiny, sm_clock, synchronise
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import selfattn

THETA = 10000.0
LARGEST_DIFFERENCE = 0.05
"""Of two implementations, in the norm: each rounds to bfloat16 after every operator of every layer."""


@dataclass(frozen=True)
class Case:
    batch: int
    length: int  # slots of a row
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    dim: int = 64
    device: str = "cuda"

    def __str__(self) -> str:
        return f"{self.layers} layers B{self.batch} L{self.length} {self.heads}:{self.kv_heads} D{self.dim}"

    @property
    def embedding_dim(self) -> int:
        return self.heads * self.dim

    def bytes(self) -> int:
        """That a step must move: weights, and keys and values in use."""
        weights = 2 * self.embedding_dim * (self.heads + self.kv_heads) * self.dim
        return 2 * self.layers * (weights + 2 * self.batch * self.length * self.kv_heads * self.dim)


CASES = [Case(1, 8192), Case(16, 8192)]
TINY = {"batch": 2, "length": 128, "layers": 2, "heads": 4, "kv_heads": 2}


@dataclass(frozen=True)
class Stack:
    step: Callable[[], Tensor]  # (B, 1, E): a token of every row through all layers
    set_length: Callable[[int], object]  # slots in use of every row
    written: Callable[[], Tensor]  # in the last slots, the keys of all layers, then the values: (2 layers, B, NKV, D)


class Data:
    """A case's layers, whose weights all implementations share, its input and the caches."""

    def __init__(self, case: Case) -> None:
        self.case = case
        width, placed = case.embedding_dim, {"device": case.device, "dtype": torch.bfloat16}
        config = selfattn.SelfAttentionConfig(
            head_dim=case.dim,
            num_kv_heads=case.kv_heads,
            rope_theta=THETA,
            rope_pairing="half",
            attention_backend="flash",
        )
        self.layers = nn.ModuleList(selfattn.SelfAttention(width, config, **placed) for _ in range(case.layers)).eval()
        # Scores that tell keys apart, and layers that add to x a fifth of it: a mean of L random values is 1 / sqrt(L).
        for layer in self.layers:
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
                nn.init.normal_(projection.weight, std=0.5 * width**-0.5)
            nn.init.normal_(layer.out_proj.weight, std=0.2 * (case.length / width) ** 0.5)
        self.x = torch.randn(case.batch, 1, width, **placed)
        sizes = {"num_kv_heads": case.kv_heads, "head_dim": case.dim, **placed}
        self.dense = selfattn.KVCache.dense(case.layers, case.batch, case.length, **sizes)
        for cache in (*self.dense.keys, *self.dense.values):
            cache.normal_()
        self.paged, self.static = self._in_pages(), self._heads_first()

    def _in_pages(self) -> selfattn.KVCache:
        """The dense cache cut into pages, which the table has in random order."""
        case = self.case
        pages = case.batch * case.length // PAGE
        rows = {"max_sequences": case.batch, "max_length": case.length, "num_kv_heads": case.kv_heads}
        placed = {"head_dim": case.dim, "dtype": torch.bfloat16, "device": case.device}
        paged = selfattn.KVCache.paged(case.layers, pages, PAGE, **rows, **placed)
        order = torch.randperm(pages, device=case.device)
        paged.page_table.copy_(order.view_as(paged.page_table))
        for page, row in zip((*paged.keys, *paged.values), (*self.dense.keys, *self.dense.values), strict=True):
            page[order] = row.view_as(page)
        return paged

    def _heads_first(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (B, NKV, L, D)."""
        pairs = zip(self.dense.keys, self.dense.values, strict=True)
        return [(keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()) for keys, values in pairs]


def ours(data: Data, cache: selfattn.KVCache) -> Stack:
    def step() -> Tensor:
        x = data.x
        for index, layer in enumerate(data.layers):
            x = x + layer(x, cache=cache.layer(index))
        cache.advance(1)
        return x

    def written() -> Tensor:
        pages = slice(None) if cache.page_table is None else cache.page_table[:, -1].long()
        return torch.stack([tensor[pages, -1] for tensor in (*cache.keys, *cache.values)])

    return Stack(step, cache.lengths.fill_, written)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def plain(data: Data, backend: SDPBackend | None, is_masked: bool, repeats: bool = False) -> Stack:
    """The stack in ATen's operators; ``backend`` None is PyTorch's choice."""
    case = data.case
    group = case.heads // case.kv_heads
    position = torch.zeros(1, dtype=torch.int64, device=case.device)
    slots = torch.arange(case.length, device=case.device)
    frequencies = THETA ** (-torch.arange(0, case.dim, 2, device=case.device) / case.dim)

    def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        if repeats:
            keys, values = (cache.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for cache in (keys, values))
        return sdpa(q, keys, values, attn_mask=mask, enable_gqa=not repeats)

    def step() -> Tensor:
        angles = (position[:, None] * frequencies).repeat(1, 2)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        mask = (slots <= position).expand(case.batch, 1, 1, -1) if is_masked else None
        x = data.x
        with nullcontext() if backend is None else sdpa_kernel(backend):
            for layer, (keys, values) in zip(data.layers, data.static, strict=True):
                projections = (layer.q_proj, layer.k_proj, layer.v_proj)
                q, k, v = (projection(x).unflatten(-1, (-1, case.dim)).transpose(1, 2) for projection in projections)
                keys.index_copy_(2, position, rotate(k, cos, sin))
                values.index_copy_(2, position, v)
                out = attend(rotate(q, cos, sin), keys, values, mask)
                x = x + layer.out_proj(out.transpose(1, 2).flatten(-2))
        if is_masked:
            position.add_(1)
        return x

    def written() -> Tensor:
        keys, values = zip(*data.static, strict=True)
        return torch.stack([tensor[:, :, -1] for tensor in (*keys, *values)])

    return Stack(step, lambda length: position.fill_(length if is_masked else case.length - 1), written)


IMPLEMENTATIONS: dict[str, Callable[[Data], Stack]] = {
    "selfattn": lambda data: ours(data, data.dense),
    "selfattn_pages": lambda data: ours(data, data.paged),
    "static_cudnn": lambda data: plain(data, SDPBackend.CUDNN_ATTENTION, is_masked=True),
    "static_efficient": lambda data: plain(data, SDPBackend.EFFICIENT_ATTENTION, is_masked=True),
    "static_math": lambda data: plain(data, SDPBackend.MATH, is_masked=True),
    "static_repeat": lambda data: plain(data, None, is_masked=True, repeats=True),
    "filled_cudnn": lambda data: plain(data, SDPBackend.CUDNN_ATTENTION, is_masked=False),
    "filled_flash2": lambda data: plain(data, SDPBackend.FLASH_ATTENTION, is_masked=False),
}


def results_of(stack: Stack, data: Data) -> tuple[Tensor, Tensor]:
    """Of the step that fills the cache: what the layers added to the input, and what they wrote."""
    stack.set_length(data.case.length - 1)
    return stack.step().float() - data.x.float(), stack.written().float()


def check(stack: Stack, data: Data, expected: tuple[Tensor, Tensor]) -> None:
    for what, result, by_ours in zip(("output", "keys and values"), results_of(stack, data), expected, strict=True):
        difference = ((result - by_ours).norm() / by_ours.norm()).item()
        if not difference < LARGEST_DIFFERENCE:
            raise ValueError(f"its {what}: {difference:.3f} away from what a dense KVCache gives")


def milliseconds(replay: Call, steps: int) -> float:
    """Of one of so many steps in a row."""
    synchronise()
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for _ in range(steps):
            replay()
        return 1e3 * (time.perf_counter() - began) / steps
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(steps):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / steps


def prepare(stack: Stack, length: int, repeats: int) -> tuple[Call, float]:
    """A replay of one step, and its host time in eager mode. Writes the last slot alone, so the caches stay as they
    are for what is compared next."""

    def last_step() -> Tensor:
        stack.set_length(length - 1)
        return stack.step()

    host = host_time(last_step, repeats)
    stack.set_length(length - 1)
    return as_graph(stack.step), host


@torch.no_grad()
def run_case(case: Case, arguments: argparse.Namespace) -> list[dict]:
    """One row an implementation; of one that cannot serve the case, or differs from ours, the reason."""
    torch.manual_seed(0)
    data, rows = Data(case), []
    expected = results_of(ours(data, data.dense), data)
    rewinds: dict[str, Callable[[int], object]] = {"copy": lambda length: None}
    replays, host = {"copy": as_graph(copy_of(case.bytes(), case.device))}, {}
    for name, make in IMPLEMENTATIONS.items():
        if arguments.impl and name not in arguments.impl:
            continue
        try:
            stack = make(data)
            check(stack, data, expected)
            replays[name], host[name] = prepare(stack, case.length, arguments.repeats)
            rewinds[name] = stack.set_length
        except (NotImplementedError, RuntimeError, ValueError) as error:
            rows.append({"case": str(case), "impl": name, "error": str(error).splitlines()[0][:150]})
    times: dict[str, list[float]] = {name: [] for name in replays}
    for turn in range(arguments.rounds):
        for name in list(replays)[:: 1 if turn % 2 else -1]:
            rewinds[name](case.length - arguments.steps)
            times[name].append(milliseconds(replays[name], arguments.steps))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, ms in medians.items():
        row = {"case": str(case), "impl": name, "ms": round(ms, 4), "share": round(medians["copy"] / ms, 3)}
        if name in host:
            row |= {"tokens_per_s": round(1e3 * case.batch / ms, 1), "host_us": round(host[name], 1)}
        rows.append(row | {"mb": round(case.bytes() / 1e6, 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", default=[], help="part of a case's name; may be repeated")
    parser.add_argument("--impl", action="append", choices=list(IMPLEMENTATIONS), help="may be repeated")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=32, help="of a turn")
    parser.add_argument("--repeats", type=int, default=10, help="of a step in eager mode")
    add_record_options(parser, "decode_h200.jsonl")
    arguments = parse_with_tiny(parser)
    cases = CASES
    if arguments.tiny:
        cases = [replace(CASES[0], **TINY, device="cuda" if torch.cuda.is_available() else "cpu")]
    for case in cases:
        if arguments.case and not any(part in str(case) for part in arguments.case):
            continue
        run = {**describe_run(arguments.commit), "clocks": sm_clock()}
        rows = run_case(case, arguments)
        with arguments.out.open("a") as out:
            out.writelines(json.dumps({**row, **run}) + "\n" for row in rows)
        for row in rows:
            said = f"{row['ms']:9.3f} ms  {row['share']:5.2f} of a copy" if "ms" in row else row["error"]
            speed = f"  {row['tokens_per_s']:9.1f} tokens/s  host {row['host_us']:.0f} us" if "host_us" in row else ""
            print(f"{case!s:36} {row['impl']:18} {said}{speed}", flush=True)


if __name__ == "__main__":
    main()
