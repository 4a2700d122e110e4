"""Times qk_norm_rope and its gradient beside a device copy, as bytes over time: one process, medians.

    python benchmarks/qk_norm_rope.py --out benchmarks/results/qk_norm_rope_h100.jsonl
    python benchmarks/qk_norm_rope.py --case "norm rotary D128" --pass forward --rounds 9

16,384 tokens, 2048 features of q (and of k, unless heads are grouped). Bytes are those of the tensors that must move: q
and k in and out, and for the gradient with the norm also the incoming one; tables and weights are not counted. A
measurement is a queue of calls that take sets of tensors in turn, together far larger than the L2 cache. Writes one
JSON line a case, pass and implementation to --out and prints a table.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from measure import add_record_options, describe_run, parse_with_tiny, sm_clock, synchronise
from torch import Tensor

import selfattn

OURS, COPY = "selfattn", "copy"
BATCH, LENGTH, HIDDEN = 2, 8192, 2048
TINY_LENGTH = 16
SETS = 3  # of tensors, taken in turn


@dataclass(frozen=True)
class Case:
    name: str
    dim: int
    norm: bool = True
    pairing: str = "interleaved"
    tables: bool = False
    packed: bool = False  # q and k are views of one projection of q, k and v
    groups: int = 1  # query heads a key head
    length: int = LENGTH
    device: str = "cuda"

    def heads(self) -> tuple[int, int]:
        return HIDDEN // self.dim, HIDDEN // self.dim // self.groups

    def elements(self) -> int:
        """Of q and k together."""
        return BATCH * self.length * sum(self.heads()) * self.dim

    def make_qk(self) -> tuple[Tensor, Tensor]:
        q_heads, k_heads = self.heads()

        def make(heads: int) -> Tensor:
            return torch.randn(BATCH, self.length, heads, self.dim, device=self.device).bfloat16()

        if not self.packed:
            return make(q_heads), make(k_heads)
        projection = make(q_heads + 2 * k_heads)
        return projection[:, :, :q_heads], projection[:, :, q_heads : q_heads + k_heads]

    def options(self) -> dict:
        options = {"norm": self.norm, "pairing": self.pairing}
        if self.norm:
            options |= {name: torch.rand(self.dim, device=self.device) for name in ("q_weight", "k_weight")}
        if self.tables:
            sin, cos = selfattn.precompute_freqs(self.dim, max_length=self.length, device=self.device)
            options |= {"freqs_sin": sin, "freqs_cos": cos}
        return options


CASES = [
    Case("norm rotary D128", 128),
    Case("norm rotary D64", 64),
    Case("rotary D128", 128, norm=False),
    Case("rotary D64", 64, norm=False),
    Case("norm rotary D128 half", 128, pairing="half"),
    Case("norm rotary D64 half", 64, pairing="half"),
    Case("norm rotary D128 tables", 128, tables=True),
    Case("norm rotary D128 packed", 128, packed=True),
    Case("norm rotary D128 grouped", 128, groups=4),
    Case("norm rotary D256", 256),
]


def ours(case: Case, backward: bool) -> tuple[list[Callable[[], object]], int]:
    """One call a set of tensors, and the bytes that a call moves."""
    options = case.options()
    heads = [case.make_qk() for _ in range(SETS)]
    grads = [tuple(torch.randn_like(x).contiguous() for x in qk) for qk in heads] if backward else [()] * SETS

    def call(qk: tuple[Tensor, Tensor], grad: tuple[Tensor, ...]) -> object:
        if not backward:
            return torch.ops.selfattn.qk_norm_rope(*qk, **options)
        return torch.ops.selfattn.qk_norm_rope_backward(*grad, *(qk if case.norm else (None, None)), **options)

    passes = 3 if backward and case.norm else 2
    calls = [lambda qk=qk, grad=grad: call(qk, grad) for qk, grad in zip(heads, grads, strict=True)]
    return calls, passes * 2 * case.elements()


def copy(case: Case) -> tuple[list[Callable[[], object]], int]:
    sources = [torch.randn(case.elements(), device=case.device).bfloat16() for _ in range(SETS)]
    targets = [torch.empty_like(source) for source in sources]
    calls = [lambda s=s, t=t: t.copy_(s) for s, t in zip(sources, targets, strict=True)]
    return calls, 2 * 2 * case.elements()


def milliseconds(calls: list[Callable[[], object]], repeats: int) -> float:
    """Of one call, in a queue of them."""
    turn = itertools.cycle(calls)
    for _ in range(2 * len(calls)):
        next(turn)()
    if not torch.cuda.is_available():
        start_time = time.perf_counter()
        for _ in range(repeats):
            next(turn)()
        return 1e3 * (time.perf_counter() - start_time) / repeats
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        next(turn)()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def median_milliseconds(
    works: dict[str, list[Callable[[], object]]], arguments: argparse.Namespace
) -> dict[str, float]:
    """Of one call of each, the median of its rounds; they take turns, in one order and then in the other."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(arguments.rounds):
        for name in list(works)[:: 1 if turn % 2 else -1]:
            synchronise()
            time.sleep(arguments.pause)
            times[name].append(milliseconds(works[name], arguments.repeats))
    return {name: statistics.median(values) for name, values in times.items()}


def run_case(case: Case, which: str, arguments: argparse.Namespace, write: Callable[[dict], None]) -> None:
    works = {OURS: ours(case, which == "backward"), COPY: copy(case)}
    medians = median_milliseconds({name: calls for name, (calls, _) in works.items()}, arguments)
    clocks = sm_clock()
    speeds = {name: works[name][1] / ms / 1e6 for name, ms in medians.items()}
    for name, ms in medians.items():
        row = {"case": case.name, "impl": name, "pass": which, "ms": round(ms, 5)}
        row |= {"gbps": round(speeds[name], 1), "ratio": round(speeds[name] / speeds[COPY], 4), "clocks": clocks}
        write(row)
    columns = "  ".join(f"{name} {medians[name] * 1e3:7.1f} us {speeds[name]:7.1f} GB/s" for name in works)
    print(f"{case.name:26} {which:8} {columns}  ratio {speeds[OURS] / speeds[COPY]:.3f}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pass", dest="passes", action="append", choices=["forward", "backward"])
    parser.add_argument("--case", action="append", default=[], help="a case's name; may be repeated; all without")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=60, help="calls of one measurement")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds of rest before each measurement")
    add_record_options(parser, "qk_norm_rope.jsonl")
    return parse_with_tiny(parser)


def main() -> None:
    arguments = parse_arguments()
    record = describe_run(arguments.commit)
    length = TINY_LENGTH if arguments.tiny else LENGTH
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with arguments.out.open("a") as out, torch.no_grad():

        def write(row: dict) -> None:
            out.write(json.dumps(row | record) + "\n")
            out.flush()

        for case in CASES:
            if not arguments.case or case.name in arguments.case:
                for which in arguments.passes or ["forward", "backward"]:
                    run_case(replace(case, length=length, device=device), which, arguments, write)


if __name__ == "__main__":
    main()
