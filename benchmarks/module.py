"""Times a whole SelfAttention beside the same layer in plain PyTorch: one process, interleaved rounds, medians.

    python benchmarks/module.py --rounds 3 --out benchmarks/results/module_h100.jsonl

Every implementation has the same parameters and input, and its output is compared with ours before it is timed. Rotary
tables are made before, in the dtype of the input: ``selfattn_tables`` is given those of the peers, ``selfattn`` and
``selfattn_compiled`` take none and find the angles themselves. Masks are made before too; the time of that stands
in ``mask_ms``. A training step, "forward+backward", ends with the gradients of the input and of every parameter.
``peak_bytes`` of a row is the most memory that one call had above what was allocated before it: above parameters,
input, tables and mask. Also timed: the four projections alone (no peer: the floor), and the host time of a forward pass
on a tiny input. Writes one JSON line a case, pass and implementation to --out and prints tables: milliseconds, and the
time of the best peer over ours.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from measure import (
    Call,
    add_family_option,
    add_options,
    describe_run,
    host_time,
    median_times,
    parse_with_tiny,
    peak_bytes,
    sm_clock,
)
from module_layers import FLOOR, IMPLEMENTATIONS, OURS, Implementation, ModuleCase, Problem, ours, sdpa_mask

PASSES = ("forward", "forward+backward")
CASES = [
    ModuleCase(attention, 4096, qk_norm)
    for attention in (Case("docs", 128, 8192, 2, mean=512), Case("causal", 128, 8192, 2))
    for qk_norm in (False, True)
]
TINY_CASES = [
    ModuleCase(attention, 128, qk_norm)
    for attention in (Case("docs", 32, 128, 2, mean=40), Case("causal", 32, 128, 2))
    for qk_norm in (False, True)
]
HOST_CASE = ModuleCase(Case("docs", 64, 64, 1, mean=24), 256, qk_norm=True)
LARGEST_DIFFERENCE = 0.05
"""Of two implementations' outputs, in the norm: tables and intermediate results are rounded to bfloat16 in some."""


def first_output(implementation: Implementation, problem: Problem) -> torch.Tensor:
    with torch.no_grad():
        return implementation.forward(problem.x)


def make_all(names: list[str], problem: Problem, expected: torch.Tensor) -> dict[str, Implementation]:
    """Those that serve the case and agree with ours; why one is left out is printed."""
    made = {}
    for name in names:
        start = time.perf_counter()
        try:
            implementation = IMPLEMENTATIONS[name](problem)
            if implementation is None:
                continue
            if implementation.computes_the_layer:
                difference = (first_output(implementation, problem).float() - expected).norm() / expected.norm()
                if not difference < LARGEST_DIFFERENCE:
                    raise ValueError(f"its output differs from ours by {difference:.3f}")
        except Exception as error:
            leave_out(problem.case, name, "forward", error)
            continue
        made[name] = implementation
        mask = "" if implementation.mask_ms is None else f", its mask of a batch takes {implementation.mask_ms:.3f} ms"
        print(f"{problem.case.name}: {name} is ready after {time.perf_counter() - start:.1f} s{mask}", flush=True)
    return made


def leave_out(case: ModuleCase, name: str, which: str, error: Exception) -> None:
    reason = " ".join(str(error).split())  # a compiler's reason stands lines below its first
    print(f"{case.name}: {name} {which} left out: {type(error).__name__}: {reason[:400]}", flush=True)


def make_call(implementation: Implementation, problem: Problem, which: str) -> Call:
    if which == "forward":
        return torch.no_grad()(lambda: implementation.forward(problem.x))
    is_layer = implementation.computes_the_layer  # or gives the output, k and v, and uses no norm
    grads = problem.grad if is_layer else (problem.grad,) * 3

    def step() -> object:
        return torch.autograd.grad(implementation.forward(problem.x), problem.leaves, grads, allow_unused=not is_layer)

    return step


def run_case(case: ModuleCase, names: list[str], arguments: argparse.Namespace, write: Callable[[dict], None]) -> None:
    torch.compiler.reset()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = Problem(case, device)
    made = make_all(names, problem, first_output(ours(problem), problem).float())
    for which in PASSES:
        calls, peaks = {}, {}
        for name, implementation in made.items():
            call = make_call(implementation, problem, which)
            try:
                call()
                peaks[name] = peak_bytes(call)
            except Exception as error:
                leave_out(case, name, which, error)
                continue
            calls[name] = call
        times = median_times(calls, arguments.rounds, arguments.pause, arguments.ms)
        clocks = sm_clock()
        for name, ms in times.items():
            row: dict[str, Any] = {"case": case.name, "impl": name, "pass": which, "ms": round(ms, 4)}
            row |= {"tokens_per_s": round(1e3 * case.tokens / ms), "peak_bytes": peaks[name]}
            write(row | {"mask_ms": made[name].mask_ms, "clocks": clocks})
        print_table(case, which, times, peaks)


def print_table(case: ModuleCase, which: str, times: dict[str, float], peaks: dict[str, int | None]) -> None:
    peers = {name: ms for name, ms in times.items() if not name.startswith(OURS) and name != FLOOR}
    best = min(peers, key=peers.get) if peers else None
    print(f"{case.name}, {which}" + (f"; the best peer is {best}" if best else ""))
    for name, ms in times.items():
        ratio = f"  {peers[best] / ms:6.3f} x" if best and name.startswith(OURS) else ""
        peak = "" if peaks[name] is None else f"  peak {peaks[name] / 2**20:8.1f} MiB"
        print(f"  {name:20} {ms:9.3f} ms  {1e3 * case.tokens / ms / 1e6:8.3f} Mtoken/s{peak}{ratio}", flush=True)


def run_host_times(write: Callable[[dict], None]) -> None:
    """Microseconds until a forward pass in eager mode returns, on an input so small that the device adds nothing."""
    problem = Problem(HOST_CASE, "cuda" if torch.cuda.is_available() else "cpu")
    for name, implementation in {OURS: ours(problem), "sdpa_mask": sdpa_mask(problem)}.items():
        for has_grad in (False, True):
            with torch.set_grad_enabled(has_grad):
                microseconds = host_time(lambda forward=implementation.forward: forward(problem.x))
            which = "forward" if has_grad else "forward without grad"
            write({"case": f"host {HOST_CASE.name}", "impl": name, "pass": which, "host_us": round(microseconds, 1)})
            print(f"host time, {HOST_CASE.name}, {which}: {name} {microseconds:.1f} us", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_family_option(parser)
    add_options(parser, list(IMPLEMENTATIONS), "module.jsonl")
    return parse_with_tiny(parser)


def main() -> None:
    arguments = parse_arguments()
    start = time.perf_counter()
    torch.manual_seed(0)
    record = describe_run(arguments.commit)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:

        def write(row: dict[str, Any]) -> None:
            out.write(json.dumps(row | record) + "\n")
            out.flush()

        run_host_times(write)
        for case in TINY_CASES if arguments.tiny else CASES:
            if not arguments.case or any(part in case.name for part in arguments.case):
                run_case(case, arguments.impl or list(IMPLEMENTATIONS), arguments, write)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
