"""Builds the CPU part for several versions of torch, runs the quick tests for each under several Pythons, prints a
table, and appends a record of each run to --record. Environments and builds are made anew, each in a folder of
--folder.

    python .ci/test_matrix.py --torch 2.11 2.15 --python python3.10 python3.13

What stands already, such as a wheel's environment, is tested by its Python and its library:

    python .ci/test_matrix.py --built bin/python lib/python3.11/site-packages/selfattn/lib/libselfattn.so
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("backends", "distributed", "doors", "gradients", "kv_cache", "module", "semantics")
TESTS += ("project/test_library.py", "project/test_self_test.py")
OUTCOMES = ("passed", "failed", "errors", "skipped")


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], cwd=ROOT, env={**os.environ, **environment}, check=False)


def must_run(*command: object) -> None:
    if code := run(*command).returncode:
        sys.exit(f"{' '.join(map(str, command))} exited with {code}")


def make_environment(folder: Path, python: str, torch: str) -> Path:
    """The Python of a fresh environment with what builds and what tests."""
    shutil.rmtree(folder, ignore_errors=True)
    must_run(python, "-m", "venv", folder)
    own = folder / "bin" / "python"
    groups = subprocess.run(
        [own, ROOT / ".ci/requirements.py", "build", "demo", "test"], check=True, capture_output=True, text=True
    )
    (folder / "requirements.txt").write_text(f"{groups.stdout}torch=={torch}.*\n")
    must_run(own, "-m", "pip", "install", "--quiet", "--requirement", folder / "requirements.txt")
    return own


def build(folder: Path, python: Path, jobs: int) -> Path:
    """The library for the torch of an environment. It holds no Python, so one serves every Python."""
    shutil.rmtree(folder, ignore_errors=True)
    cmake = python.parent / "cmake"
    ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={python.parent / 'ninja'}"]
    options = ["-DSELFATTN_CUDA=OFF", f"-DPython3_EXECUTABLE={python}", "-DCMAKE_INSTALL_LIBDIR=lib"]
    options += ["-DSELFATTN_UNITY_BUILD=ON"]
    must_run(cmake, *ninja, *options, "-B", folder, "-S", ROOT)
    must_run(cmake, "--build", folder, "-j", jobs)
    return folder / "libselfattn.so"


def test(python: Path, library: Path, tests: list[str], log: Path, jobs: int) -> dict[str, object]:
    """A record: software, what was tested, how many tests ended how."""
    own = {"SELFATTN_LIBRARY": str(library), "PYTHONPATH": str(ROOT)}
    if run(python, "-m", "selfattn", **own).returncode:
        sys.exit(f"python -m selfattn fails with {library}")
    command = [python, "-m", "pytest", "-q", "-n", jobs, "--dist", "worksteal", "-m", "not slow"]
    command += [ROOT / "tests/python" / name for name in tests]
    start = time.monotonic()
    with log.open("w") as file:
        code = subprocess.run(
            [*map(str, command)], cwd=ROOT, env={**os.environ, **own}, stdout=file, check=False
        ).returncode
    if code not in (0, 1):  # all passed, some failed
        sys.exit(f"pytest ended with {code} before it had run every test: {log}")
    seconds = round(time.monotonic() - start)
    last = log.read_text().splitlines()[-1]
    counts = {outcome.rstrip("s"): int(number) for number, outcome in re.findall(r"(\d+) (\w+)", last)}
    versions = "import platform, torch; print(torch.__version__, platform.python_version(), platform.machine())"
    found = subprocess.run([python, "-c", versions], check=True, capture_output=True, text=True).stdout.split()
    return {
        **dict(zip(("torch", "python", "machine"), found, strict=True)),
        **{outcome: counts.get(outcome.rstrip("s"), 0) for outcome in OUTCOMES},
        "tests": tests,
        "seconds": seconds,
        "commit": subprocess.run(
            ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def environments(arguments: argparse.Namespace) -> Iterator[tuple[str, Path, Path]]:
    """A name, a Python and a library of each run."""
    if arguments.built:
        python, library = arguments.built
        yield "built", Path(python).absolute(), Path(library).resolve()
        return
    for torch in arguments.torch:
        library = None
        for python in arguments.python:
            name = f"torch{torch}-{Path(python).name}"
            own = make_environment(arguments.folder / name, python, torch)
            library = library or build(arguments.folder / f"torch{torch}", own, arguments.jobs)
            yield name, own, library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", default=[], metavar="MINOR", help="e.g. 2.15")
    parser.add_argument("--python", nargs="+", default=[], help="interpreters")
    parser.add_argument("--built", nargs=2, metavar=("PYTHON", "LIBRARY"), help="in the place of --torch and --python")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="in tests/python")
    parser.add_argument("--folder", type=Path, default=ROOT / "build-matrix")
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks/results/torch_matrix.jsonl")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations and tests at a time")
    arguments = parser.parse_args()
    fresh = bool(arguments.torch), bool(arguments.python)
    if fresh != ((False, False) if arguments.built else (True, True)):
        parser.error("either --built, or both --torch and --python, must be given")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, python, library in environments(arguments):
        rows.append(test(python, library, [*arguments.tests], arguments.folder / f"{name}.log", arguments.jobs))
        with arguments.record.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    columns = ("torch", "python", *OUTCOMES)
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in columns) + " |")
    return int(any(row["failed"] or row["errors"] or not row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
