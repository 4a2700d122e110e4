"""Times two builds of the library beside each other: what a change of the kernels costs.

    python benchmarks/compare_builds.py --before old/libselfattn.so --after build/libselfattn.so --rounds 9

A process can hold one build, so each has a process of its own, and they take turns on the card: one measures while the
other waits. Writes one JSON line a case and pass: the medians of both, and the median of the ratios after / before
(above 1: slower than before). --small adds calls of a few microseconds; --case and --pass choose.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from cases import CASES, FLOPS_PER_PAIR, Case
from measure import add_record_options, describe_run, sm_clock

SMALL = [Case("causal", 128, 128, 1), Case("docs", 128, 256, 1, 64), Case("causal", 64, 512, 1)]
"""Calls whose time is mostly that of launching them."""


def work(milliseconds: int) -> None:
    """Serves measurements: a line with a case's name and a pass prepares it (once) and times it."""
    import torch
    from attention import OURS, prepare
    from measure import median_time

    by_name = {case.name: case for case in [*CASES, *SMALL]}
    prepared_for, call = None, None
    for line in sys.stdin:
        name, which = json.loads(line)
        if prepared_for != (name, which):
            call = None
            torch.manual_seed(0)
            case = by_name[name]
            call = prepare(OURS, case, (*case.tensors(), case.tensors()[0]), which)
            prepared_for = (name, which)
        torch.cuda.synchronize()
        print(f"ms {median_time(call, milliseconds)}", flush=True)


def start_worker(library: Path, milliseconds: int) -> subprocess.Popen:
    environment = {**os.environ, "SELFATTN_LIBRARY": str(library.resolve())}
    command = [sys.executable, __file__, "--worker", "--ms", str(milliseconds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(worker: subprocess.Popen, name: str, which: str) -> float:
    worker.stdin.write(json.dumps([name, which]) + "\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("ms "):
            return float(line.split()[1])
    sys.exit(f"a worker ended while it measured {name}, {which}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--after", type=Path)
    parser.add_argument("--case", action="append", default=[], help="part of a case's name; may be repeated")
    parser.add_argument("--pass", dest="passes", action="append", choices=list(FLOPS_PER_PAIR), help="may be repeated")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ms", type=int, default=60, help="time spent on one build in one round")
    parser.add_argument("--small", action="store_true", help="small calls too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    add_record_options(parser, "compare_builds.jsonl")
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.ms)
    if not arguments.before or not arguments.after:
        parser.error("--before and --after are needed")
    workers = {name: start_worker(getattr(arguments, name), arguments.ms) for name in ("before", "after")}
    cases = [*CASES, *(SMALL if arguments.small else [])]
    cases = [case for case in cases if not arguments.case or any(part in case.name for part in arguments.case)]
    record = describe_run(arguments.commit)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:
        for case in cases:
            for which in arguments.passes or ["forward", "backward"]:
                times: dict[str, list[float]] = {name: [] for name in workers}
                for turn in range(arguments.rounds):
                    for name in list(workers)[:: 1 if turn % 2 else -1]:
                        times[name].append(ask(workers[name], case.name, which))
                ratios = [a / b for a, b in zip(times["after"], times["before"], strict=True)]
                row = {"case": case.name, "pass": which, "ratio": round(statistics.median(ratios), 4)}
                row |= {f"ms_{name}": round(statistics.median(values), 5) for name, values in times.items()}
                row |= {**record, "clocks": sm_clock(), "rounds": arguments.rounds}
                out.write(json.dumps(row) + "\n")
                print(f"{case.name:32} {which:9} {row['ms_before']:9.4f} {row['ms_after']:9.4f} ms  {row['ratio']:.4f}")
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return None


if __name__ == "__main__":
    main()
