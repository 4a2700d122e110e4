"""Times two builds of the library beside each other: what a change of the kernels costs.

    python benchmarks/compare_builds.py --before old/libselfattn.so --after build/libselfattn.so --rounds 9

A process can hold one build, so each has a process of its own, and they take turns on the card: one measures while the
other waits. Writes one JSON line a case and pass: the medians of both, and the median of the ratios after / before
(above 1: slower than before). --small adds calls of a few microseconds; --case and --pass choose. Two families of one
build are compared by --before-family and --after-family.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cases import CASES, Case
from measure import FAMILIES, FAMILY_VARIABLE, add_record_options, describe_run, sm_clock

SMALL = [Case("causal", 128, 128, 1), Case("docs", 128, 256, 1, 64), Case("causal", 64, 512, 1)]
"""Calls whose time is mostly that of launching them."""
HOST = "host of "
"""Before a pass: the time until its call returns."""


def work(milliseconds: int) -> None:
    """Serves measurements: a line with a case's name and a pass prepares it (once) and times it."""
    import module
    import torch
    from attention import OURS, prepare
    from measure import host_time, median_time

    kernels = {case.name: case for case in [*CASES, *SMALL]}
    layers = {f"layer {case.name}": case for case in [*module.CASES, module.HOST_CASE]}

    def prepare_call(name: str, which: str) -> Callable[[], object]:
        if name in layers:
            problem = module.Problem(layers[name], "cuda")
            return module.make_call(module.ours(problem), problem, which)
        case = kernels[name]
        return prepare(OURS, case, (*case.tensors(), case.tensors()[2]), which)

    prepared_for, call = None, None
    for line in sys.stdin:
        name, which = json.loads(line)
        is_host = which.startswith(HOST)
        if prepared_for != (name, which):
            call = None
            torch.manual_seed(0)
            call = prepare_call(name, which.removeprefix(HOST))
            prepared_for = (name, which)
        torch.cuda.synchronize()
        print(f"ms {host_time(call) / 1e3 if is_host else median_time(call, milliseconds)}", flush=True)


def start_worker(library: Path, family: str | None, milliseconds: int) -> subprocess.Popen:
    environment = {**os.environ, "SELFATTN_LIBRARY": str(library.resolve())}
    if family:
        environment[FAMILY_VARIABLE] = family
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
    parser.add_argument("--before-family", choices=FAMILIES, help="of CUDA kernels, in the build before")
    parser.add_argument("--after-family", choices=FAMILIES)
    parser.add_argument("--case", action="append", default=[], help="part of a case's name; may be repeated")
    parser.add_argument(
        "--pass", dest="passes", action="append", help="forward, backward (of a layer forward+backward)"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ms", type=int, default=60, help="time spent on one build in one round")
    parser.add_argument("--small", action="store_true", help="small calls too")
    parser.add_argument("--layer", action="store_true", help="whole layers too")
    parser.add_argument("--host", action="store_true", help="host times of the small calls and of a layer too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    add_record_options(parser, "compare_builds.jsonl")
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.ms)
    if not arguments.before or not arguments.after:
        parser.error("--before and --after are needed")
    os.environ.setdefault("SELFATTN_LIBRARY", str(arguments.after.resolve()))  # the package is imported below
    import module

    families = {"before": arguments.before_family, "after": arguments.after_family}
    workers = {build: start_worker(getattr(arguments, build), families[build], arguments.ms) for build in families}
    passes, layer_passes = ("forward", "backward"), module.PASSES
    calls = [(case.name, which) for case in [*CASES, *(SMALL if arguments.small else [])] for which in passes]
    host_layer = f"layer {module.HOST_CASE.name}"
    if arguments.layer:
        calls += [(f"layer {case.name}", which) for case in module.CASES for which in layer_passes]
    if arguments.host:
        calls += [(case.name, HOST + which) for case in SMALL for which in passes]
        calls += [(host_layer, HOST + which) for which in layer_passes]
    calls = [
        (name, which)
        for name, which in calls
        if (not arguments.case or any(part in name for part in arguments.case))
        and (not arguments.passes or which in arguments.passes)
    ]
    record = describe_run(arguments.commit)
    own = record.pop("family")
    record |= {f"family_{build}": family or own for build, family in families.items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:
        for name, which in calls:
            times: dict[str, list[float]] = {build: [] for build in workers}
            for turn in range(arguments.rounds):
                for build in list(workers)[:: 1 if turn % 2 else -1]:
                    times[build].append(ask(workers[build], name, which))
            ratios = [a / b for a, b in zip(times["after"], times["before"], strict=True)]
            row = {"case": name, "pass": which, "ratio": round(statistics.median(ratios), 4)}
            row |= {f"ms_{build}": round(statistics.median(values), 5) for build, values in times.items()}
            row |= {**record, "clocks": sm_clock(), "rounds": arguments.rounds}
            out.write(json.dumps(row) + "\n")
            print(
                f"{name:40} {which:16} {row['ms_before']:9.4f} {row['ms_after']:9.4f} ms  {row['ratio']:.4f}",
                flush=True,
            )
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return None


if __name__ == "__main__":
    main()
