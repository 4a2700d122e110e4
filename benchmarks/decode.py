"""Times attention over a KV cache on CUDA beside a device copy and its peers, and what writes into the cache.

    python benchmarks/decode.py --out benchmarks/results/decode_h200.jsonl
    python benchmarks/decode.py --case "B1 L8192" --impl selfattn --impl cudnn

``us``: one call as a replayed CUDA graph after the L2 cache was flushed, launch included; the median of rounds in which
the implementations take turns. The flush reads: one that writes leaves dirty lines for the timed call to evict.
``share``: of the bandwidth of ``copy``, which moves as many bytes as the call must (keys and values in use, q, out).
``empty`` is a graph of one small kernel. ``host_us``: until a call returns, from Python.

Peers take dense caches of one length (cudnn, flash2) and pages (FlashInfer's, where it can be imported and its modules
are built; its plan() is not counted). ``selfattn_pages`` reads the same cache in pages of 64 in random order,
``selfattn_pages16`` in pages of 16, ``selfattn_ids`` takes the queries as one row with segment ids. ``forward`` is the
forward kernel on the same shape, for chunks. Where one row alone has a chunk of queries, as a server's step gives them,
the others make two calls, one of that row and one of the rest.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from measure import add_record_options, describe_run, host_time, parse_with_tiny, sm_clock, synchronise
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

import selfattn

FLUSH_BYTES = 256 << 20
PAGE = 64
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    batch: int
    length: int  # of every row, or the longest
    heads: int
    kv_heads: int
    dim: int
    queries: int = 1
    chunk: int = 0  # queries of the first row; 0: as many as the others have
    shortest: int = 0  # lengths are spread from here on; 0: all are equal
    appends: bool = False  # what writes a token of every row into the cache, with norm and rotation
    device: str = "cuda"

    def __str__(self) -> str:
        length = f"{self.shortest}-{self.length}" if self.shortest else f"{self.length}"
        more = (f" Sq{self.queries}" if self.queries > 1 else "") + (f" chunk{self.chunk}" if self.chunk else "")
        more += " append" if self.appends else ""
        return f"B{self.batch} L{length} {self.heads}:{self.kv_heads} D{self.dim}{more}"

    def lengths(self) -> list[int]:
        if not self.shortest:
            return [self.length] * self.batch
        step = (self.length - self.shortest) / (self.batch - 1)
        return [round(self.shortest + step * (37 * i % self.batch)) for i in range(self.batch)]

    def bytes(self) -> int:
        """That a call must move, of 16-bit elements."""
        tokens = self.batch * self.queries + (self.chunk - self.queries if self.chunk else 0)
        if self.appends:
            return 2 * 2 * tokens * (self.heads + 2 * self.kv_heads) * self.dim
        return 2 * self.dim * (2 * sum(self.lengths()) * self.kv_heads + 2 * tokens * self.heads)


CASES = [
    Case(1, 1024, 32, 8, 128),
    Case(1, 8192, 32, 8, 128),
    Case(1, 131072, 32, 8, 128),
    Case(16, 8192, 32, 8, 128),
    Case(64, 4096, 32, 8, 128),
    Case(128, 2048, 32, 8, 128),
    Case(64, 8192, 32, 8, 128, shortest=128),
    Case(16, 8192, 64, 8, 128),
    Case(16, 8192, 16, 16, 128),
    Case(16, 8192, 32, 4, 64),
    Case(8, 8192, 8, 2, 256),
    Case(32, 4096, 32, 8, 128, queries=4),
    Case(1, 8192, 32, 8, 128, queries=512),
    Case(64, 8192, 32, 8, 128, chunk=512),
    Case(16, 8192, 32, 8, 128, chunk=2048),
    Case(1, 1024, 32, 8, 128, appends=True),
    Case(64, 1024, 32, 8, 128, appends=True),
    Case(16, 4096, 32, 8, 128, queries=1024, appends=True),
]


class Data:
    """A case's tensors; the last token of a row, or the last ``queries``, are those of the call."""

    def __init__(self, case: Case) -> None:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, device=case.device, dtype=torch.bfloat16)

        self.case = case
        self.q = randn(case.batch, case.queries, case.heads, case.dim)
        self.chunk = randn(1, case.chunk, case.heads, case.dim)
        self.caches = [randn(case.batch, case.length, case.kv_heads, case.dim) for _ in range(2)]
        self.lengths = torch.tensor(case.lengths(), dtype=torch.int32, device=case.device)

    def pages(self, size: int) -> tuple[list[Tensor], Tensor]:
        """The caches cut into pages, and a table in random order."""
        case = self.case
        per_row = case.length // size
        pages = [cache.view(case.batch * per_row, size, case.kv_heads, case.dim) for cache in self.caches]
        table = torch.randperm(case.batch * per_row, dtype=torch.int32).view(case.batch, per_row)
        return pages, table.to(case.device)


def ours(data: Data, page_size: int = 0, by_ids: bool = False) -> Call:
    op, case, lengths = torch.ops.selfattn.attention_with_kv_cache, data.case, data.lengths
    caches, table = data.pages(page_size) if page_size else (data.caches, None)
    if by_ids:
        counts = [case.chunk or case.queries, *[case.queries] * (case.batch - 1)]
        ids = torch.arange(case.batch, dtype=torch.int32).repeat_interleave(torch.tensor(counts))[None]
        ids = ids.to(case.device)
        rows = data.q[1:] if case.chunk else data.q
        q = torch.cat([data.chunk, rows.flatten(0, 1)[None]], 1)
        return lambda: op(q, *caches, lengths, table, ids, backend="flash")
    if not case.chunk:
        return lambda: op(data.q, *caches, lengths, table, backend="flash")

    def call() -> None:
        for q, rows in ((data.chunk, slice(1)), (data.q[1:], slice(1, None))):
            own = caches if page_size else [cache[rows] for cache in caches]
            op(q, *own, lengths[rows], None if table is None else table[rows], backend="flash")

    return call


def append(data: Data) -> Call:
    case = data.case
    k, v = (torch.randn_like(data.q[:, :, : case.kv_heads]) for _ in range(2))
    weight = torch.rand(case.dim, device=case.device)
    positions = data.lengths[:, None] - case.queries + torch.arange(case.queries, device=case.device)
    k_cache, v_cache = data.caches
    return lambda: torch.ops.selfattn.qk_norm_rope_append(
        data.q, k, v, positions, q_weight=weight, k_weight=weight, k_cache=k_cache, v_cache=v_cache
    )


def dense_sdpa(data: Data, backend: SDPBackend) -> Call:
    if data.case.shortest or data.case.chunk:
        raise NotImplementedError("rows of one length and one number of queries only")
    q, k, v = (tensor.transpose(1, 2) for tensor in (data.q, *data.caches))
    mask = None
    if data.case.queries > 1:
        mask = causal_lower_right(data.case.queries, data.case.length)

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, attn_mask=mask, enable_gqa=q.size(1) > k.size(1)).transpose(1, 2)

    return call


def flashinfer(data: Data, tensor_cores: bool) -> Call:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    case = data.case
    if case.queries > 1 or case.chunk:
        raise NotImplementedError("one query a row only")
    (k, v), table = data.pages(PAGE)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=case.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
    used = [math.ceil(length / PAGE) for length in case.lengths()]
    first = torch.tensor([0, *used]).cumsum(0).int()
    indices = torch.cat([table[row, :count] for row, count in enumerate(used)])
    last = torch.tensor([n - (count - 1) * PAGE for n, count in zip(case.lengths(), used, strict=True)]).int()
    dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(first, indices, last, case.heads, case.kv_heads, case.dim, PAGE, **dtypes)
    return lambda: wrapper.run(data.q[:, 0], (k, v))


def forward(data: Data) -> Call:
    if data.case.queries < 64:
        raise NotImplementedError("chunks only")
    return lambda: selfattn.multihead_attention(data.q, *data.caches, backend="flash")


IMPLEMENTATIONS: dict[str, Callable[[Data], Call]] = {
    "selfattn": ours,
    "selfattn_pages": lambda data: ours(data, PAGE),
    "selfattn_pages16": lambda data: ours(data, 16),
    "selfattn_ids": lambda data: ours(data, by_ids=True),
    "cudnn": lambda data: dense_sdpa(data, SDPBackend.CUDNN_ATTENTION),
    "flash2": lambda data: dense_sdpa(data, SDPBackend.FLASH_ATTENTION),
    "flashinfer": lambda data: flashinfer(data, tensor_cores=False),
    "flashinfer_tc": lambda data: flashinfer(data, tensor_cores=True),
    "forward": forward,
}


def copy_of(size: int, device: str) -> Call:
    """A copy that moves ``size`` bytes, read and written together."""
    source = torch.empty(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def as_graph(call: Call) -> Call:
    """A replay of the call, whose tensors live as long as it does."""
    call()
    synchronise()
    if not torch.cuda.is_available():
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(_reads: Call = call) -> None:
        graph.replay()

    return replay


def microseconds(call: Call, flush: Tensor, repeats: int) -> float:
    """Of one call after a flush, the median."""
    times = []
    for _ in range(repeats):
        flush.max()
        if torch.cuda.is_available():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end))
        else:
            began = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - began))
    return statistics.median(times)


def run_case(case: Case, arguments: argparse.Namespace, flush: Tensor) -> list[dict]:
    """One row an implementation; of one that cannot serve the case, the reason."""
    torch.manual_seed(0)
    data, calls, rows = Data(case), {}, []
    makers = {"selfattn": append} if case.appends else IMPLEMENTATIONS
    for name, make in makers.items():
        if arguments.impl and name not in arguments.impl:
            continue
        try:
            call = make(data)
            call()
            host = host_time(call, arguments.repeats)
            calls[name] = as_graph(call), host
        except (NotImplementedError, ImportError, RuntimeError) as error:
            rows.append({"case": str(case), "impl": name, "error": str(error).splitlines()[0][:150]})
    small = torch.zeros(1, device=case.device)
    calls["copy"] = as_graph(copy_of(case.bytes(), case.device)), None
    calls["empty"] = as_graph(lambda: small.add_(1)), None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(arguments.rounds):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            times[name].append(microseconds(calls[name][0], flush, arguments.repeats))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, us in medians.items():
        row = {"case": str(case), "impl": name, "us": round(us, 2), "share": round(medians["copy"] / us, 3)}
        rows.append(row | {"mb": round(case.bytes() / 1e6, 3), "host_us": calls[name][1] and round(calls[name][1], 1)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", default=[], help="part of a case's name; may be repeated")
    parser.add_argument("--impl", action="append", choices=list(IMPLEMENTATIONS), help="may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=10)
    add_record_options(parser, "decode_h200.jsonl")
    arguments = parse_with_tiny(parser)
    cases = CASES
    if arguments.tiny:
        small = {"batch": 2, "length": 128}
        cases = [
            replace(case, **small, **{name: min(getattr(case, name), 64) for name in ("shortest", "queries", "chunk")})
            for case in CASES
        ]
        if not torch.cuda.is_available():
            cases = [replace(case, device="cpu") for case in cases]
    flush = torch.zeros((1 << 20 if arguments.tiny else FLUSH_BYTES) // 4, dtype=torch.int32, device=cases[0].device)
    for case in cases:
        if arguments.case and not any(part in str(case) for part in arguments.case):
            continue
        run = {**describe_run(arguments.commit), "clocks": sm_clock()}
        rows = run_case(case, arguments, flush)
        with arguments.out.open("a") as out:
            out.writelines(json.dumps({**row, **run}) + "\n" for row in rows)
        columns = [
            f"{row['impl']} {row['us']:.1f} ({row['share']:.2f})" if "us" in row else f"{row['impl']} -" for row in rows
        ]
        print(f"{case!s:32} " + "  ".join(columns), flush=True)


if __name__ == "__main__":
    main()
