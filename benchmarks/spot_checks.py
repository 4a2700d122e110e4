"""Ratios and latencies of the attention kernels that no peer stands beside: one process, interleaved rounds, medians.

    python benchmarks/spot_checks.py --out benchmarks/results/attention_spot_checks_h100.jsonl

Forward with ids of any order, and with one document, over the same call without ids; documents named in no order over
documents numbered from left to right; positions over none; backward with 2 key heads and in the deterministic mode over
the plain call; device time of the preparation of segments; host time of a call on a tiny shape. Writes one JSON line a
check: its name, the unit and a value for every round.
"""

import argparse
import functools
import json
import statistics
from contextlib import contextmanager

import torch
from cases import Case
from measure import Call, add_family_option, add_record_options, describe_run, host_time, times_of_rounds
from support.problems import names
from torch import Tensor

import selfattn

KEY_HEADS = 2
PAUSE = 0.04  # seconds of rest before each measurement
flash = torch.ops.selfattn.flash_attention


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def ratios(times: dict[str, list[float]], name: str, base: str) -> list[float]:
    return [round(a / b, 3) for a, b in zip(times[name], times[base], strict=True)]


def check_ids(rounds: int, milliseconds: int) -> dict[str, tuple[str, list[float]]]:
    case = Case("causal", 128, 8192, 2)
    q, k, v = case.tensors()
    any_order = torch.randint(0, 2, q.shape[:2], dtype=torch.int32, device="cuda")
    ids = {"no ids": None, "ids 0 and 1 in any order": any_order, "one document": torch.zeros_like(any_order)}
    times = times_of_rounds({n: lambda i=i: flash(q, k, v, i) for n, i in ids.items()}, rounds, PAUSE, milliseconds)
    return {
        f"forward {case.name}, {name} over no ids": ("time ratio", ratios(times, name, "no ids"))
        for name in list(ids)[1:]
    }


def check_names(rounds: int, milliseconds: int) -> dict[str, tuple[str, list[float]]]:
    """Documents whose ids are names in no order, over the same documents numbered from left to right."""
    results = {}
    for mean in (64, 256, 1024):
        case = Case("docs", 128, 16384, 1, mean)
        numbers = case.segment_ids()
        ids = {"numbers": numbers, "names": names(numbers).to(numbers.dtype)}
        leaves = [tensor.requires_grad_() for tensor in case.tensors()]
        grad = torch.randn_like(leaves[0])

        def forward(ids: Tensor, leaves: list[Tensor] = leaves) -> object:
            with torch.no_grad():
                return flash(*leaves, ids)

        def step(ids: Tensor, leaves: list[Tensor] = leaves, grad: Tensor = grad) -> object:
            return torch.autograd.grad(flash(*leaves, ids)[0], leaves, grad)

        for name, function in (("forward", forward), ("forward and backward", step)):
            calls = {kind: functools.partial(function, each) for kind, each in ids.items()}
            times = times_of_rounds(calls, rounds, PAUSE, milliseconds)
            results[f"{name} {case.name}, names over numbers"] = ("time ratio", ratios(times, "names", "numbers"))
    return results


def check_positions(rounds: int, milliseconds: int) -> dict[str, tuple[str, list[float]]]:
    """Calls with positions, of tokens in their order and in none, over the call without: what the copies cost, too."""
    case = Case("causal", 128, 16384, 1)
    leaves = [tensor.requires_grad_() for tensor in case.tensors()]
    grad = torch.randn_like(leaves[0])
    row = torch.arange(leaves[0].shape[1], device="cuda", dtype=torch.int32)[None]
    positions = {"no": None, "ascending": row, "permuted": row[:, torch.randperm(row.shape[1], device="cuda")]}

    def forward(positions: Tensor | None) -> object:
        with torch.no_grad():
            return flash(*leaves, positions=positions)

    def step(positions: Tensor | None) -> object:
        return torch.autograd.grad(flash(*leaves, positions=positions)[0], leaves, grad)

    results = {}
    for name, function in (("forward", forward), ("forward and backward", step)):
        calls = {kind: functools.partial(function, each) for kind, each in positions.items()}
        times = times_of_rounds(calls, rounds, PAUSE, milliseconds)
        for kind in list(positions)[1:]:
            results[f"{name} {case.name}, {kind} positions over none"] = ("time ratio", ratios(times, kind, "no"))
    return results


def check_backward(rounds: int, milliseconds: int) -> dict[str, tuple[str, list[float]]]:
    case = Case("causal", 128, 16384, 1)

    def backward(k: Tensor, v: Tensor) -> Call:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = flash(*leaves)[0]
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    q, k, v = case.tensors()
    grad = torch.randn_like(q)
    plain = backward(k, v)

    def in_fixed_order() -> None:
        with deterministic():
            plain()

    grouped = backward(k[:, :, :KEY_HEADS].contiguous(), v[:, :, :KEY_HEADS].contiguous())
    times = times_of_rounds({"plain": plain, "grouped": grouped, "fixed": in_fixed_order}, rounds, PAUSE, milliseconds)
    return {
        f"backward {case.name}, {KEY_HEADS} key heads over {case.heads}": (
            "time ratio",
            ratios(times, "grouped", "plain"),
        ),
        f"backward {case.name}, speed of the deterministic mode": ("speed ratio", ratios(times, "plain", "fixed")),
    }


def check_preparation(rounds: int) -> dict[str, tuple[str, list[float]]]:
    results = {}
    for length, mean, has_names in ((16384, 16, False), (16384, 1024, False), (32768, 4096, False), (16384, 64, True)):
        case = Case("docs", 128, length, 1, mean)
        ids = case.segment_ids()
        ids = names(ids).to(ids.dtype) if has_names else ids
        q = torch.randn(1, length, 1, 128, device="cuda", dtype=torch.bfloat16)
        flash(q, q, q, ids)
        microseconds = []
        for _ in range(rounds):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(20):
                    flash(q, q, q, ids)
                torch.cuda.synchronize()
            kernels = [e.device_time for e in profile.events() if "prepare_segments" in e.name]
            microseconds.append(round(statistics.median(kernels), 2))
        name = f"preparation of segments, {case.name}{', named' if has_names else ''}"
        results[name] = ("us", microseconds)
    return results


def check_host_times(rounds: int) -> dict[str, tuple[str, list[float]]]:
    q = torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    ids = torch.zeros(1, 64, dtype=torch.int32, device="cuda")
    calls = {
        "flash_attention": lambda: flash(q, q, q),
        "flash_attention with ids": lambda: flash(q, q, q, ids),
        "multihead_attention with ids": lambda: selfattn.multihead_attention(q, q, q, ids),
    }
    return {
        f"host time, {name}, B1 S64 H2 D64": ("us", [round(host_time(call), 1) for _ in range(rounds)])
        for name, call in calls.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ms", type=int, default=60, help="time spent on one call in one round")
    add_family_option(parser)
    add_record_options(parser, "attention_spot_checks_h100.jsonl")
    arguments = parser.parse_args()
    record = describe_run(arguments.commit)
    torch.manual_seed(0)
    with torch.no_grad():
        results = check_host_times(arguments.rounds) | check_preparation(arguments.rounds)
        results |= check_ids(arguments.rounds, arguments.ms)
    for check in (check_names, check_positions, check_backward):
        results |= check(arguments.rounds, arguments.ms)
    with arguments.out.open("a") as out:
        for name, (unit, values) in results.items():
            out.write(json.dumps({"case": name, "unit": unit, "values": values, **record}) + "\n")
            print(f"{name}: median {statistics.median(values):.3f} {unit} of {values}", flush=True)


if __name__ == "__main__":
    main()
