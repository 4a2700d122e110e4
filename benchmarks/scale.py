"""Times attention, a layer and training steps over several ranks beside one of them, in one run.

    torchrun --nproc-per-node 2 benchmarks/scale.py --set operator --out benchmarks/results/scale.jsonl
    torchrun --nproc-per-node 2 benchmarks/scale.py --tiny    # on the CPU: tries the script out

NCCL with a GPU a rank, or Gloo on the CPU. The first rank alone, all ranks, and peers on all ranks take turns, in
rounds; all begin a measurement together and the slowest rank counts; medians. What is computed is compared with one
rank's before it is timed. The sets (--set may be repeated; all without):

    primitives  collectives of 1 to 256 MiB: alone, and beside the kernel of attention, of which SMs are held back
    operator    context parallelism of one row, forward and backward
    layer       the same of a SelfAttention; nobody adds up the gradients of its weights
    tensor      a SelfAttention over heads
    step        a training step with its optimizer: rows of their own (weak scaling), and a row over all ranks
    peers       PyTorch's context_parallel (a ring) on one document; FlexAttention over gathered keys on documents
    memory      the most a rank has allocated in a pass, its inputs, weights and optimizer included; no times

One JSON line a case and implementation goes to --out, and a line to the terminal. ``efficiency`` is the time of the
first rank alone, times what all ranks compute over what it does, over ranks times their time; ``ratio`` a peer's time
over ours. ``busbw_gbps`` counts a collective's bytes as nccl-tests does; ``added_ms`` is the time that a collective
adds to the kernels that it runs beside, without SMs held back. --trace writes a Chrome trace of the first rank a case
and implementation, and to the row what the devices did (``device_ms``, by rank: job.device_times).
"""

import argparse
import gc
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from job import Job, profile_call, times_in_turns
from measure import Call, add_turn_options, parse_with_tiny, sm_clock
from scale_contenders import Contender, Ready
from scale_sets import SETS, Contest, Facts

LARGEST_DIFFERENCE = 0.02
"""Of the output and a gradient from those of one rank, in the norm."""


# ---------------------------------------------------------------- a contest


def free_memory() -> int:
    """Bytes of the GPU that are allocated still."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def take_part(job: Job, contender: Contender) -> tuple[Ready | None, str | None]:
    """Its call, made once; or why some rank could not."""

    def attempt() -> Ready | None:
        if contender.is_alone and job.rank != 0:
            return None
        ready = contender.make(job)
        ready.call()
        return ready

    return job.try_together(attempt)


def check(job: Job, ready: Ready | None, expected: torch.Tensor | None) -> tuple[float | None, str | None]:
    """How far the first rank finds what all computed from what it computed alone; or why it must not be timed."""

    def attempt() -> float | None:
        found = None if ready is None or ready.whole is None else ready.whole()
        if found is None or expected is None:
            return None
        difference = ((found.float() - expected).norm() / expected.norm()).item()
        if not difference < LARGEST_DIFFERENCE:
            raise ValueError(f"differs from one rank by {difference:.3g}")
        return float(f"{difference:.1e}")

    return job.try_together(attempt)


def run_contest(job: Job, one: Contest, arguments: argparse.Namespace, write: Callable[[Facts], None]) -> None:
    calls: dict[str, Call | None] = {}
    facts: dict[str, Facts] = {}
    expected = None
    for name, contender in one.contenders.items():
        ready, failure = take_part(job, contender)
        difference = None
        if failure is None and contender.is_alone and ready is not None and ready.whole is not None:
            expected = ready.whole().float()
        elif failure is None and not contender.is_alone:
            difference, failure = check(job, ready, expected)
        if failure is not None:
            leave_out(job, one, name, failure, write)
            continue
        calls[name] = None if ready is None else ready.call
        facts[name] = {} if difference is None else {"difference": difference}
    times = times_in_turns(job, calls, arguments.rounds, arguments.ms, arguments.pause)
    clocks = sm_clock() if job.rank == 0 else None
    for name, milliseconds in times.items():
        contender = one.contenders[name]
        if arguments.trace and one.is_traced and not contender.is_alone:
            path = arguments.trace / f"{file_name(one.set, one.case, name)}.json.gz"
            facts[name]["device_ms"] = profile_call(job, calls[name], path)
        row = {"ms": round(milliseconds, 4), **one.derive(times, name, job), **facts[name], "clocks": clocks}
        write(head(job, one, name) | row)
        job.say(line(one, name, row))


def measure_memory(job: Job, one: Contest, write: Callable[[Facts], None]) -> None:
    """One contender after another, alone in memory."""
    for name, contender in one.contenders.items():
        peaks, failure = peaks_of_ranks(job, contender)
        if failure is not None:
            leave_out(job, one, name, failure, write)
            continue
        write(head(job, one, name) | {"peak_bytes": peaks})
        job.say(line(one, name, {"peak_mib": [round(peak / 2**20) for peak in peaks]}))


def peaks_of_ranks(job: Job, contender: Contender) -> tuple[list[int], str | None]:
    """Of the second call, which finds the optimizer's state."""
    if not job.is_cuda:
        return [], "needs CUDA: nobody counts what is allocated on the CPU"
    before = free_memory()
    ready, failure = take_part(job, contender)
    if failure is None and ready is not None:
        free_memory()
        torch.cuda.reset_peak_memory_stats()
    if failure is None:
        _, failure = job.try_together(lambda: ready and ready.call())
    peaks = job.gather(torch.cuda.max_memory_allocated() - before)
    return peaks[:1] if contender.is_alone else peaks, failure


def head(job: Job, one: Contest, name: str) -> Facts:
    ranks = 1 if one.contenders[name].is_alone else job.size
    which = "forward" if one.set == "primitives" else "forward+backward"
    return {"set": one.set, "case": one.case, "impl": name, "pass": which, "ranks": ranks, **one.facts}


def leave_out(job: Job, one: Contest, name: str, failure: str, write: Callable[[Facts], None]) -> None:
    write(head(job, one, name) | {"left_out": failure})
    job.say(f"{one.set:10} {one.case:44} {name:28} left out: {failure}")


def line(one: Contest, name: str, row: Facts) -> str:
    shown = {key: value for key, value in row.items() if key != "clocks" and value is not None}
    return f"{one.set:10} {one.case:44} {name:28} " + "  ".join(f"{key} {value}" for key, value in shown.items())


def file_name(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", "_".join(parts))


# ---------------------------------------------------------------- the program


def run(job: Job, arguments: argparse.Namespace) -> None:
    record = job.describe(arguments.commit)

    def write(row: Facts) -> None:
        if job.rank == 0:
            with arguments.out.open("a") as out:
                out.write(json.dumps(row | record) + "\n")

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.set or SETS:
        for one in SETS[name](job, arguments.tiny):
            if arguments.case and not any(part in one.case for part in arguments.case):
                continue
            if job.is_cuda:
                free_memory()
            if one.is_timed:
                run_contest(job, one, arguments, write)
            else:
                measure_memory(job, one, write)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", action="append", choices=list(SETS), help="of cases; may be repeated")
    parser.add_argument("--case", action="append", default=[], help="part of a case's name; may be repeated")
    parser.add_argument("--trace", type=Path, help="the folder for traces")
    add_turn_options(parser, "scale.jsonl")
    return parser


def main() -> None:
    arguments = parse_with_tiny(make_parser())
    try:
        run(Job.begin(), arguments)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
