"""Times attention over a KV cache on the CPU beside SDPA and beside reading the cache.

The implementations of a case take turns, so that a slow moment of the machine touches all of them; compare within a
case. `read` sums up the same bytes as float32, in one vectorised pass; `share` is a row's bandwidth beside that of
`read`. `sdpa_gqa` is scaled_dot_product_attention with enable_gqa, `sdpa_rows` the same with the heads of a group
folded into the rows of one. Caches hold rows of equal length, (B, L, NKV, D), as serving fills them. Each measurement
becomes a row of benchmarks/results/decode_cpu.jsonl.

    python benchmarks/decode_cpu.py --cases "32:8" --dtypes bfloat16 --threads 1 2
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from attention_cpu import describe_run, take_turns
from measure import ROOT as BENCHMARKS
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import selfattn  # noqa: F401  (registers the operators)


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    dim: int
    queries: int = 1
    page_size: int = 0  # 0: a dense cache
    batch: int = 0  # 0: what makes up --megabytes
    length: int = 16384

    def __str__(self) -> str:
        page = f" page{self.page_size}" if self.page_size else ""
        length = f" B{self.batch} L{self.length}" if self.batch else ""
        return f"{self.heads}:{self.kv_heads} D{self.dim} Sq{self.queries}{page}{length}"


CASES = [
    Case(32, 8, 128),
    Case(16, 16, 128),
    Case(64, 8, 128),
    Case(32, 8, 128, queries=4),
    Case(32, 4, 64),
    Case(8, 2, 256),
    Case(32, 8, 128, page_size=16),
    Case(32, 8, 128, page_size=64),
    Case(32, 8, 128, queries=512, batch=1, length=4096),
]


def implementations(case: Case, dtype: torch.dtype, megabytes: int) -> tuple[dict[str, Callable[[], Tensor]], int]:
    """By name, and the bytes of keys and values."""
    token_bytes = 2 * case.kv_heads * case.dim * dtype.itemsize
    batch = case.batch or max(megabytes * 2**20 // (token_bytes * case.length), 1)
    q = torch.randn(batch, case.queries, case.heads, case.dim).to(dtype)
    caches = [torch.empty(batch, case.length, case.kv_heads, case.dim, dtype=dtype).normal_() for _ in range(2)]
    lengths = torch.full((batch,), case.length, dtype=torch.int32)
    pages, table = caches, None
    if case.page_size:
        pages = [cache.view(-1, case.page_size, case.kv_heads, case.dim) for cache in caches]
        table = torch.randperm(pages[0].size(0), dtype=torch.int32).view(batch, -1)

    def ours() -> Tensor:
        return torch.ops.selfattn.attention_with_kv_cache(q, *pages, lengths, table, backend="flash")

    def read() -> Tensor:
        return caches[0].view(torch.float32).sum() + caches[1].view(torch.float32).sum()

    found = {"read": read, "selfattn": ours}
    if case.page_size:
        return found, batch * case.length * token_bytes
    heads_first = [tensor.transpose(1, 2) for tensor in (q, *caches)]
    mask = None
    if case.queries > 1:
        mask = torch.ones(case.queries, case.length, dtype=torch.bool).tril(case.length - case.queries)
    found["sdpa_gqa"] = lambda: sdpa(*heads_first, attn_mask=mask, enable_gqa=True)
    if case.queries == 1 and case.heads > case.kv_heads:
        folded = q.view(batch, case.kv_heads, -1, case.dim)
        found["sdpa_rows"] = lambda: sdpa(folded, *heads_first[1:])
    return found, batch * case.length * token_bytes


def time_case(case: Case, dtype: torch.dtype, arguments: argparse.Namespace) -> list[dict]:
    """One row an implementation."""
    functions, cache_bytes = implementations(case, dtype, arguments.megabytes)
    times = take_turns(functions, arguments.repeats)
    medians = {name: statistics.median(milliseconds) for name, milliseconds in times.items()}
    return [
        {
            "case": str(case),
            "dtype": str(dtype).removeprefix("torch."),
            "impl": name,
            "cache_mb": round(cache_bytes / 1e6),
            "ms": round(medians[name], 3),
            "best_ms": round(min(times[name]), 3),
            "gb_per_s": round(cache_bytes / medians[name] / 1e6, 2),
            "share": round(medians["read"] / medians[name], 3),
            "ratio": round(medians[name] / medians["selfattn"], 3),
        }
        for name in functions
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=[], help="cases, or beginnings of them; all if none is given")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--megabytes", type=int, default=1024, help="of keys and values; more than the caches hold")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "decode_cpu.jsonl")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    print(f"{'case':36} {'dtype':9} {'threads':>7} {'impl':10} {'ms':>9} {'GB/s':>7} {'share':>6} {'ratio':>7}")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        run = describe_run()
        for case in CASES:
            if arguments.cases and not str(case).startswith(tuple(arguments.cases)):
                continue
            for dtype in arguments.dtypes:
                torch.manual_seed(0)
                rows = time_case(case, getattr(torch, dtype), arguments)
                with arguments.out.open("a") as out:
                    out.writelines(json.dumps({**row, **run}) + "\n" for row in rows)
                for row in rows:
                    print(
                        f"{row['case']:36} {row['dtype']:9} {threads:7} {row['impl']:10} {row['ms']:9.2f} "
                        f"{row['gb_per_s']:7.2f} {row['share']:6.2f} {row['ratio']:7.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
