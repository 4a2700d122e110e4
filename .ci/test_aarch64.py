"""Runs the C++ tests of a build for aarch64 in emulation, on each processor that is named, and appends a record of each
run to --record.

    python .ci/test_aarch64.py build-aarch64/build --torch build-aarch64/site-packages --processors neoverse-n1 max

--library names the folder of a libselfattn.so that is loaded in the place of the build's, e.g. a wheel's.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = "qemu-aarch64"


def first_line(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def test(program: Path, processor: str, arguments: argparse.Namespace) -> dict[str, object]:
    """A record: software, how many tests ended how."""
    results = program.parent / "results.json"
    results.unlink(missing_ok=True)
    command = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", "-cpu", processor]
    if arguments.library:
        command += ["-E", f"LD_LIBRARY_PATH={arguments.library.resolve()}"]
    command += [str(program), f"--gtest_output=json:{results}", *arguments.gtest]
    start = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    seconds = round(time.monotonic() - start)
    if code not in (0, 1):  # all passed, some failed
        sys.exit(f"{program} ended with {code} before it had run every test")
    report = json.loads(results.read_text())
    cases = [case for suite in report["testsuites"] for case in suite["testsuite"]]
    failed = [f"{case['classname']}.{case['name']}" for case in cases if case.get("failures")]
    skipped = sum(case["result"] == "SKIPPED" for case in cases)
    return {
        "what": "C++ tests of the CPU library in emulation",
        "machine": "aarch64",
        "processor": processor,
        "emulator": re.search(r"version ([\d.]+)", first_line(EMULATOR, "--version"))[1],
        "compiler": first_line("aarch64-linux-gnu-g++", "--version").split()[-1],
        "torch": re.search(r"__version__ = '(.+)'", (arguments.torch / "torch/version.py").read_text())[1],
        "library": "wheel" if arguments.library else "build",
        "passed": report["tests"] - len(failed) - skipped,
        "failed": failed,
        "skipped": skipped,
        "seconds": seconds,
        "commit": first_line("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="CMake's folder")
    parser.add_argument("--torch", type=Path, required=True, help="the folder of the package torch for aarch64")
    parser.add_argument("--library", type=Path, help="the folder of another libselfattn.so")
    parser.add_argument("--processors", nargs="+", required=True, help=f"of those that `{EMULATOR} -cpu help` names")
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks/results/aarch64.jsonl")
    parser.add_argument("--gtest", nargs="*", default=[], help="options for the tests, e.g. --gtest_filter=KVCache*")
    arguments = parser.parse_args()
    rows = []
    for processor in arguments.processors:
        rows.append(test(arguments.build / "tests/cpp/selfattn_tests", processor, arguments))
        with arguments.record.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    for row in rows:
        print(f"{row['processor']}: {row['passed']} passed, {len(row['failed'])} failed, {row['skipped']} skipped")
    return int(any(row["failed"] or not row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
