"""Reads what ptxas said in a build's output (nvcc with -Xptxas -v) of every kernel on every architecture, and fails on
what costs a kernel its speed or does not run at all:

- products that were serialised (warnings C75xx, of Hopper's wgmma);
- registers spilled to memory, beyond what is allowed;
- more registers than a thread has;
- more shared memory, static and dynamic, than a thread block may have on the cards that run the code;
- kernels of the family sm80 that were compiled for fewer architectures than others of their kind (those of unaligned
  rows are for Hopper, too).

    cmake --build build 2>&1 | tee build.log
    build/tests/cpp/cuda/selfattn_shared_memory > shared_memory.txt
    python cmake/check_ptxas.py build.log --shared-memory shared_memory.txt --allow sm90+backward=496 --allow sm80=256

ptxas reports spills a function, not a loop. A few bytes outside the main loop are harmless: the warps that load run
with few registers, and what repairs a tile is a function of its own. What is known to spill more is named with --allow;
accumulators would add to that.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

KERNEL = re.compile(r"Compiling entry function\s+'?(\w+)'? for '(\w+)'")
FUNCTION = re.compile(r"Function properties for\s+'?(\w+)")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers.*")
STATIC = re.compile(r"(\d+) bytes smem")
SERIALISED = re.compile(r"\(C75\d\d\).*")
SM80_KERNEL = re.compile(
    r"4sm80\d+(flash_attention_\w+?_kernel)INS\d_\d+\w+?ConfigI(?:13__nv_bfloat16|6__half)Li(\d+)ELi(\d+)E"
)

UNALIGNED = "RowLayoutE1"  # in the names of kernels for RowLayout::kUnaligned

MAX_REGISTERS = 255
KIB = 1024
# Kernels that are launched where a device has the shared memory for them; others take the call elsewhere.
ASKS_THE_DEVICE = ("flash_attention_backward_kernel",)
MOST_SHARED_MEMORY = {  # of a thread block, on the card with the least that runs the code
    "sm_75": 64 * KIB,
    "sm_80": 99 * KIB,  # 8.6 and 8.9; 8.0 and 8.7 have 163
    "sm_86": 99 * KIB,
    "sm_87": 163 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_90a": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_103": 227 * KIB,
    "sm_110": 227 * KIB,
    "sm_120": 99 * KIB,
    "sm_121": 99 * KIB,
}


@dataclass
class Compiled:
    """A kernel, or a function that it calls, on one architecture."""

    name: str
    arch: str
    is_kernel: bool
    spilled: int = 0
    registers: int = 0
    static_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.name} for {self.arch}"


def read_log(log: str) -> tuple[list[Compiled], list[str]]:
    """What was compiled, and the warnings of serialised products."""
    functions, serialised = [], []
    kernel = function = None
    for line in log.splitlines():
        if match := SERIALISED.search(line):
            serialised.append(match.group())
        if match := KERNEL.search(line):
            kernel = function = Compiled(match[1], match[2], is_kernel=True)
            functions.append(kernel)
        elif match := FUNCTION.search(line):
            if kernel is not None and match[1] != kernel.name:
                function = Compiled(match[1], kernel.arch, is_kernel=False)
                functions.append(function)
        elif function is not None and (match := SPILL.search(line)):
            function.spilled = max(int(match[1]), int(match[2]))
        elif kernel is not None and (match := USED.search(line)):
            kernel.registers = int(match[1])
            static = STATIC.search(match.group())
            kernel.static_bytes = int(static[1]) if static else 0
    return functions, serialised


def read_shared_memory(text: str) -> dict[tuple[str, int, int], int]:
    """(kernel, DQK, DV) -> bytes of dynamic shared memory, as tests/cuda/shared_memory.cu prints them."""
    rows = (line.split() for line in text.splitlines())
    return {(kernel, int(dim), int(value_dim)): int(size) for kernel, dim, value_dim, size in rows}


def allowed_spill(function: Compiled, max_spill_bytes: int, allowances: dict[str, int]) -> int:
    """``allowances``: bytes by parts of a function's name, and its architecture, joined by "+"; it must have all."""
    limits = [
        limit
        for parts, limit in allowances.items()
        if all(part == function.arch or part in function.name for part in parts.split("+"))
    ]
    return max([max_spill_bytes, *limits])


def complaints(
    functions: list[Compiled],
    max_spill_bytes: int,
    allowances: dict[str, int],
    shared_memory: dict[tuple[str, int, int], int] | None = None,
) -> list[str]:
    found = []
    architectures: dict[str, set[str]] = {}
    for function in functions:
        if function.spilled > allowed_spill(function, max_spill_bytes, allowances):
            found.append(f"{function.spilled} bytes spilled in {function}")
        if function.registers > MAX_REGISTERS:
            found.append(f"{function.registers} registers in {function}")
        if not function.is_kernel:
            continue
        if "4sm80" in function.name:
            architectures.setdefault(function.name, set()).add(function.arch)
        dynamic_bytes, match = 0, SM80_KERNEL.search(function.name)
        if match and shared_memory is not None:
            dynamic_bytes = shared_memory.get((match[1], int(match[2]), int(match[3])))
            if dynamic_bytes is None:
                found.append(f"nobody says how much dynamic shared memory there is in {function}")
                continue
        most = MOST_SHARED_MEMORY.get(function.arch, 99 * KIB)
        if match and match[1] in ASKS_THE_DEVICE:
            most = max(MOST_SHARED_MEMORY.values())
        if function.static_bytes + dynamic_bytes > most:
            found.append(f"{function.static_bytes + dynamic_bytes} bytes of shared memory, of {most}, in {function}")
    every: dict[bool, set[str]] = {}
    for name, present in architectures.items():
        every.setdefault(UNALIGNED in name, set()).update(present)
    for name, present in architectures.items():
        if missing := every[UNALIGNED in name] - present:
            found.append(f"{name} was not compiled for {', '.join(sorted(missing))}, as others were")
    return list(dict.fromkeys(found))


def summary(functions: list[Compiled]) -> str:
    """By architecture, the kernels and the most that one of them spills."""
    parts = []
    for arch in sorted({function.arch for function in functions}):
        kernels = [function for function in functions if function.arch == arch and function.is_kernel]
        parts.append(f"{arch}: {len(kernels)} kernels, spills up to {max(kernel.spilled for kernel in kernels)} bytes")
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--max-spill-bytes", type=int, default=64, help="for each function")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="PART+PART=BYTES", help="for functions with all parts"
    )
    parser.add_argument("--shared-memory", type=Path, help="what tests/cuda/shared_memory.cu printed")
    arguments = parser.parse_args()
    allowances = {name: int(limit) for name, limit in (text.split("=") for text in arguments.allow)}
    functions, found = read_log(arguments.log.read_text(errors="replace"))
    if not any(function.is_kernel for function in functions):
        sys.exit(f"{arguments.log}: ptxas reported no kernel; was it built with -Xptxas -v, and not from a cache?")
    shared_memory = read_shared_memory(arguments.shared_memory.read_text()) if arguments.shared_memory else None
    found += complaints(functions, arguments.max_spill_bytes, allowances, shared_memory)
    print(summary(functions))
    for complaint in found:
        print(complaint)
    sys.exit(f"{len(found)} complaints" if found else 0)


if __name__ == "__main__":
    main()
