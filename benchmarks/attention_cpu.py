"""Times attention on the CPU beside what PyTorch offers: SDPA, dense, with a mask or in a loop over documents; Flex.

The implementations of a case take turns, so that a slow moment of the machine touches all of them; compare within a
case, by the column of ratios. GFLOP/s count allowed pairs only: 4 * D for each and head forward, 10 * D backward.
Each measurement becomes a row of benchmarks/results/attention_cpu.jsonl.

    python benchmarks/attention_cpu.py --cases documents --dtypes bfloat16 --flex
"""

import argparse
import functools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from cases import document_lengths
from measure import ROOT as BENCHMARKS  # makes support importable
from support.problems import names
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import selfattn  # noqa: F401  (registers the operators)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, H, S, D) each


@dataclass(frozen=True)
class Case:
    name: str
    heads: int
    queries: int
    keys: int
    dim: int
    causal: bool = True
    kv_heads: int = 0  # 0: heads
    mean_length: int = 0  # of documents; 0: one document
    has_backward: bool = True

    def __str__(self) -> str:
        lengths = f"S{self.keys}" if self.queries == self.keys else f"Sq{self.queries} Skv{self.keys}"
        heads = f"H{self.heads}" + (f":{self.kv_heads}" if self.kv_heads else "")
        return f"{self.name} B1 {heads} {lengths} D{self.dim}"


CASES = [
    Case("causal", 8, 2048, 2048, 64),
    Case("causal", 16, 2048, 2048, 128),
    Case("full", 8, 2048, 2048, 64, causal=False),
    Case("one_head", 1, 4096, 4096, 64),
    Case("grouped", 16, 2048, 2048, 64, kv_heads=4),
    Case("documents64", 8, 4096, 4096, 64, mean_length=64),
    Case("documents256", 8, 4096, 4096, 64, mean_length=256),
    Case("documents1024", 8, 4096, 4096, 64, mean_length=1024),
    Case("decode", 32, 1, 8192, 128, causal=False, kv_heads=8, has_backward=False),
    Case("decode_one_head", 8, 4, 16384, 128, causal=False, kv_heads=1, has_backward=False),
]


def implementations(case: Case, with_flex: bool) -> tuple[dict[str, Attention], float]:
    """By name, and the number of allowed pairs of a head."""
    ids, lengths = None, [case.keys]
    if case.mean_length:
        lengths = document_lengths(case.keys, case.mean_length, seed=0)
        ids = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
    pairs = case.queries * case.keys if case.queries != case.keys else sum(n * n for n in lengths)

    def flash(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None = ids) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        pairs = {"segment_ids": None if ids is None else ids[None], "causal": case.causal}
        return torch.ops.selfattn.flash_attention(q, k, v, **pairs)[0].transpose(1, 2)

    group = {"enable_gqa": True} if case.kv_heads else {}
    found: dict[str, Attention] = {"selfattn": flash}
    if ids is None:
        found["sdpa"] = lambda q, k, v: sdpa(q, k, v, is_causal=case.causal, **group)
        return found, pairs / 2 if case.causal else pairs

    found["selfattn_named"] = functools.partial(flash, ids=names(ids).int())  # the same documents, in no order
    same = ids[:, None] == ids[None]
    mask = same.tril() if case.causal else same
    found["sdpa_mask"] = lambda q, k, v: sdpa(q, k, v, attn_mask=mask)

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        documents = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
        return torch.cat([sdpa(*document, is_causal=case.causal) for document in documents], 2)

    found["sdpa_loop"] = loop
    if with_flex:
        found["flex"] = compiled_flex(case, ids)
    return found, pairs / 2 if case.causal else pairs


def compiled_flex(case: Case, ids: Tensor) -> Attention:
    """Forward only: PyTorch has no backward of it on CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def is_allowed(batch, head, i, j):
        return (ids[i] == ids[j]) & (i >= j) if case.causal else ids[i] == ids[j]

    block_mask = create_block_mask(is_allowed, None, None, case.queries, case.keys, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def take_turns(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each repeat."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def time_case(case: Case, dtype: torch.dtype, arguments: argparse.Namespace) -> list[dict]:
    """One row an implementation and pass."""
    kv_heads = case.kv_heads or case.heads
    q, grad = (torch.randn(1, case.heads, case.queries, case.dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, kv_heads, case.keys, case.dim).to(dtype) for _ in range(2))
    attentions, pairs = implementations(case, arguments.flex)

    def forward(attention: Attention) -> Tensor:
        with torch.no_grad():
            return attention(q, k, v)

    def forward_backward(attention: Attention) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        return torch.autograd.grad(attention(*leaves), leaves, grad)

    passes = {"forward": (forward, 4.0)}
    if case.has_backward:
        passes["forward_backward"] = (forward_backward, 14.0)
    rows = []
    for name, (run, flop) in passes.items():
        functions = {
            impl: (lambda attention=attention, run=run: run(attention))
            for impl, attention in attentions.items()
            if not (impl == "flex" and name != "forward")
        }
        times = take_turns(functions, arguments.repeats)
        for impl, milliseconds in times.items():
            median = statistics.median(milliseconds)
            rows.append(
                {
                    "case": str(case),
                    "dtype": str(dtype).removeprefix("torch."),
                    "impl": impl,
                    "pass": name,
                    "ms": round(median, 3),
                    "best_ms": round(min(milliseconds), 3),
                    "gflops": round(flop * case.dim * case.heads * pairs / median / 1e6, 1),
                    "ratio": round(median / statistics.median(times["selfattn"]), 3),
                }
            )
    return rows


def describe_run() -> dict[str, str | int]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=BENCHMARKS, capture_output=True, text=True)
    return {
        "device": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=[], help="names, or beginnings of names; all if none is given")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--flex", action="store_true", help="also time compiled FlexAttention on documents")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "attention_cpu.jsonl")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    run = describe_run()
    print(" ".join(f"{key}={value}" for key, value in run.items()))
    print(f"{'case':36} {'dtype':9} {'pass':17} {'impl':10} {'ms':>9} {'GFLOP/s':>8} {'ratio':>7}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:
        for case in CASES:
            if arguments.cases and not str(case).startswith(tuple(arguments.cases)):
                continue
            for dtype in arguments.dtypes:
                for row in time_case(case, getattr(torch, dtype), arguments):
                    out.write(json.dumps({**row, **run}) + "\n")
                    print(
                        f"{row['case']:36} {row['dtype']:9} {row['pass']:17} {row['impl']:10} {row['ms']:9.2f} "
                        f"{row['gflops']:8.1f} {row['ratio']:7.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
