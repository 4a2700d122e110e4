"""Builds the CPU part for several versions of torch, runs the quick tests for each under several Pythons, and prints a
table. Environments and builds are made anew, each in a folder of --folder.

    python .ci/test_matrix.py --torch 2.11 2.15 --python python3.10 python3.13
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
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
        [own, ROOT / ".ci/requirements.py", "build", "test"], check=True, capture_output=True, text=True
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
    must_run(cmake, *ninja, *options, "-B", folder, "-S", ROOT)
    must_run(cmake, "--build", folder, "-j", jobs)
    return folder / "libselfattn.so"


def test(python: Path, library: Path, log: Path, jobs: int) -> dict[str, int]:
    """How many tests ended how."""
    own = {"SELFATTN_LIBRARY": str(library), "PYTHONPATH": str(ROOT)}
    if run(python, "-m", "selfattn", **own).returncode:
        sys.exit(f"python -m selfattn fails with {library}")
    command = [python, "-m", "pytest", "-q", "-n", jobs, "--dist", "worksteal", "-m", "not slow"]
    command += [ROOT / "tests/python" / name for name in TESTS]
    with log.open("w") as file:
        subprocess.run([*map(str, command)], cwd=ROOT, env={**os.environ, **own}, stdout=file, check=False)
    last = log.read_text().splitlines()[-1]
    counts = {outcome.rstrip("s"): int(number) for number, outcome in re.findall(r"(\d+) (\w+)", last)}
    return {outcome: counts.get(outcome.rstrip("s"), 0) for outcome in OUTCOMES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", required=True, metavar="MINOR", help="e.g. 2.15")
    parser.add_argument("--python", nargs="+", required=True, help="interpreters")
    parser.add_argument("--folder", type=Path, default=ROOT / "build-matrix")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations and tests at a time")
    arguments = parser.parse_args()
    rows = []
    for torch in arguments.torch:
        library = None
        for python in arguments.python:
            name = f"torch{torch}-{Path(python).name}"
            own = make_environment(arguments.folder / name, python, torch)
            library = library or build(arguments.folder / f"torch{torch}", own, arguments.jobs)
            counts = test(own, library, arguments.folder / f"{name}.log", arguments.jobs)
            versions = "import platform, torch; print(torch.__version__, platform.python_version())"
            found = subprocess.run([own, "-c", versions], check=True, capture_output=True, text=True).stdout.split()
            rows.append((found, counts))
    print("| torch | Python | " + " | ".join(OUTCOMES) + " |")
    print("|---" * (2 + len(OUTCOMES)) + "|")
    for found, counts in rows:
        print("| " + " | ".join([*found, *map(str, counts.values())]) + " |")
    return int(any(counts["failed"] or counts["errors"] or not counts["passed"] for _, counts in rows))


if __name__ == "__main__":
    sys.exit(main())
