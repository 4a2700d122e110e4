"""Reads what ptxas said in a build's output (nvcc with -Xptxas -v) and fails on what costs a Hopper kernel its speed:
products that were serialised (warnings C75xx), and registers spilled to memory.

    cmake --build build 2>&1 | tee build.log
    python cmake/check_ptxas.py build.log --allow backward=496 --allow backward_dkdv=832 --allow forward=192

ptxas reports spills a kernel, not a loop. A few bytes outside the main loop are harmless: the warps that load run with
few registers. A kernel whose other warps are known to spill more is named with --allow; accumulators would add to that.
"""

import argparse
import re
import sys
from pathlib import Path

FUNCTION = re.compile(r"(?:Compiling entry function|Function properties for)\s+'?(\w+)")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
SERIALISED = re.compile(r"\(C75\d\d\).*")


def complaints(log: str, max_spill_bytes: int, allowances: dict[str, int]) -> tuple[list[str], int]:
    """What is wrong, and the number of kernels seen. ``allowances``: more bytes, for kernels with such a name."""
    found, kernels, function = [], 0, "an unknown function"
    for line in log.splitlines():
        if match := SERIALISED.search(line):
            found.append(match.group())
        if match := FUNCTION.search(line):
            function = match.group(1)
        if match := SPILL.search(line):
            kernels += 1
            spilled = max(int(match.group(1)), int(match.group(2)))
            limits = [limit for name, limit in allowances.items() if name in function]
            if spilled > max([max_spill_bytes, *limits]):
                found.append(f"{spilled} bytes spilled in {function}")
    return found, kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--max-spill-bytes", type=int, default=64, help="for each kernel")
    parser.add_argument("--allow", action="append", default=[], metavar="NAME=BYTES", help="for kernels so named")
    arguments = parser.parse_args()
    allowances = {name: int(limit) for name, limit in (text.split("=") for text in arguments.allow)}
    found, kernels = complaints(arguments.log.read_text(errors="replace"), arguments.max_spill_bytes, allowances)
    if not kernels:
        sys.exit(f"{arguments.log}: ptxas reported no kernel; was it built with -Xptxas -v, and not from a cache?")
    for complaint in found:
        print(complaint)
    sys.exit(f"{len(found)} complaints about {kernels} kernels" if found else 0)


if __name__ == "__main__":
    main()
