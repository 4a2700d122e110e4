"""Runs the tests that need a GPU and appends a record of them to results/gpu_tests.jsonl.

    SELFATTN_LIBRARY=build/libselfattn.so python benchmarks/gpu_tests.py --workers 8

A record: counts, names of what failed, what pytest was asked for besides, device, family of CUDA kernels, what the
families were compiled for (a "virtual" one is PTX, which the driver compiles), the shared memory that a thread block
was allowed (SELFATTN_SHARED_MEMORY, KiB; null: the card's own), software, commit, date. --family forces a family, so
that both can be tested on one card. A library of PTX alone, as a card unknown to this build meets it, comes of
TORCH_CUDA_ARCH_LIST=13.0; CUDA_FORCE_PTX_JIT=1 is of no use, since PyTorch's own kernels have none for every card.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from measure import add_family_option, add_record_options, describe_run

from selfattn._library import build_of, library_path

ROOT = Path(__file__).resolve().parents[1]


def run_tests(report: Path, workers: int, extra: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", "--tb=short", *extra]
    if workers > 1:
        command += ["-n", str(workers), "--dist", "worksteal"]  # slow tests stand together
    # The float64 references of all workers compute at the same time.
    threads = str(max((os.cpu_count() or 1) // workers, 1))
    subprocess.run(command, cwd=ROOT, check=False, env={"OMP_NUM_THREADS": threads, **os.environ})


def summarise(report: Path) -> dict[str, object]:
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {"passed": passed, **counts, "failed": failed, "seconds": float(suite.get("time", 0))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="processes, with pytest-xdist")
    add_family_option(parser)
    add_record_options(parser, "gpu_tests.jsonl")
    arguments, extra = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run_tests(report, arguments.workers, extra)
        result = summarise(report)
    asked = {"arguments": extra, "shared_memory": os.environ.get("SELFATTN_SHARED_MEMORY")}
    kernels = build_of(library_path()).get("kernels")
    record = {**result, **asked, "kernels": kernels, **describe_run(arguments.commit)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:
        out.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
