"""compute-sanitizer's tools over small problems of every form of the CUDA kernels; appends a record for each tool.

    SELFATTN_LIBRARY=build/libselfattn.so PYTHONPATH=. python benchmarks/sanitizers.py memcheck racecheck

Forms: each tile of head dimensions; no ids, documents, ids in any order, positions; finite values, NaN in a row of
every tensor and logits so large that their rows are repaired; deterministic mode; a negative scale; and, in memcheck
alone for its length, rows of 1,700 tokens. Over a KV cache: each tile, dense, pages, ids, drafts, split keys, chunks,
the appends and their slots. The tools run at the same time. Only kernels of this library are looked at. --family forces
a family of kernels.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import add_family_option, add_record_options, describe_run
from support.kv_cache import CacheCase
from support.problems import make_ids, make_positions

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
OURS = ["--kernel-name", "kernel_substring=selfattn"]
LENGTH = 200


def call(
    dim: int,
    length: int = LENGTH,
    ids: str | None = None,
    values: str = "finite",
    value_dim: int | None = None,
    positions: str | None = None,
    **options: object,
) -> None:
    """One forward and one backward pass over bf16 rows of two query heads and one key head."""

    def normal(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(1, length, heads, dim, device="cuda").bfloat16()

    factor = 60 if values == "large" else 1  # logits of several thousand: their rows go through the repair
    value_dim = value_dim or dim
    q, k, v, grad = factor * normal(2, dim), factor * normal(1, dim), normal(1, value_dim), normal(2, value_dim)
    segment_ids = None if ids is None else make_ids(ids, 1, length).cuda()
    if positions is not None:
        options["positions"] = make_positions(positions, 1, length, length)[0].cuda()
    if values == "nan":
        for tensor in (q, k, v, grad):
            tensor[:, length // 2] = float("nan")
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out, _ = torch.ops.selfattn.flash_attention(*leaves, segment_ids, **options)
    torch.autograd.grad(out, leaves, grad)
    torch.cuda.synchronize()


def call_with_cache(**changes: object) -> None:
    """Attention over a small cache of bf16 rows; what no query sees is NaN, and its pages are not there."""
    case = CacheCase(rows=2, page_size=16, pages_per_row=12, dtype=torch.bfloat16, lengths="full").with_(**changes)
    call = case.make("cuda")
    torch.ops.selfattn.flash_attention_kv_cache(**call)
    torch.cuda.synchronize()


def append_to_cache(dim: int) -> None:
    """A token of each of three rows, of which one is not written."""
    q, k, v = (torch.randn(1, 3, heads, dim, device="cuda").bfloat16() for heads in (4, 2, 2))
    caches = {name: torch.zeros(4, 16, 2, dim, device="cuda", dtype=torch.bfloat16) for name in ("k_cache", "v_cache")}
    positions, ids = (torch.tensor([values], device="cuda") for values in ([0, 17, 5], [1, 0, -1]))
    table = torch.tensor([[3, 1], [2, 0]], device="cuda")
    torch.ops.selfattn.qk_norm_rope_append(q, k, v, positions, table, ids, **caches)
    torch.ops.selfattn.append_kv_cache(k, v, positions, table, ids, **caches)
    torch.cuda.synchronize()


def place_tokens(columns: int) -> None:
    """Slots of the tokens of three rows, and the lengths behind them, in order and ragged."""
    lengths, ids = torch.tensor([0, 5, 9], device="cuda"), torch.randint(-1, 3, (3, columns), device="cuda")
    for segment_ids in (None, ids):
        call = (segment_ids, columns, 10_000)
        after, positions = torch.ops.selfattn.positions_of_append(lengths, *call)
        torch.ops.selfattn.kv_cache_positions(after, *call)
        torch.ops.selfattn.kv_cache_positions(after, *call, positions)
    torch.cuda.synchronize()


CHUNK = {"rows": 4, "num_heads": 32, "num_kv_heads": 4, "num_queries": 70}  # which the forward kernel takes
CACHE_FORMS = [
    *({"dim": dim, "table": table} for dim in (64, 128, 256) for table in (None, "shuffled")),
    *({"dim": dim, "num_queries": 40} for dim in (64, 128, 256)),
    {"dim": 64, "ids": "any_order", "num_queries": 9},
    {"dim": 64, "num_queries": 5, "has_draft_mask": True, "has_sinks": True, "softcap": 20.0},
    {"dim": 64, "split_keys": 64, "rows": 300},
    *(CHUNK | {"dim": dim, "table": table} for dim in (64, 128, 256) for table in (None, "shuffled")),
    CHUNK | {"dim": 128, "lengths": "mixed", "window_left": 20, "has_sinks": True, "softcap": 20.0},
]


def run_forms(tool: str) -> int:
    """Every form once; the number of problems."""
    import selfattn  # noqa: F401

    torch.manual_seed(0)
    problems = [
        dict(dim=dim, ids=ids, values=values, causal=True)
        for dim in (64, 128, 256)
        for ids in (None, "padding_after", "shuffled_padding")
        for values in ("finite", "nan")
    ]
    problems += [dict(dim=dim, length=130, values="large", causal=True) for dim in (64, 128, 256)]
    problems += [
        dict(dim=dim, value_dim=value_dim, ids=ids, values=values, causal=True)
        for dim, value_dim in ((96, 96), (192, 128), (192, 192))
        for ids, values in ((None, "nan"), ("padding_after", "finite"), ("shuffled_padding", "large"))
    ]
    problems += [dict(dim=128, length=90, causal=True, qk_scale=-0.3), dict(dim=72, ids="padding_after", causal=False)]
    problems += [
        dict(dim=dim, ids=ids, positions="permuted", causal=True)
        for dim in (64, 128, 256)
        for ids in (None, "shuffled_padding")
    ]
    if tool == "memcheck":
        problems += [dict(dim=dim, length=1700, values="nan", causal=False) for dim in (64, 128, 256)]
    for problem in problems:
        call(**problem)
    for form in CACHE_FORMS:
        call_with_cache(**form)
    for dim in (64, 128, 256):
        append_to_cache(dim)
    for columns in (1, 600):
        place_tokens(columns)
    torch.use_deterministic_algorithms(True)
    for dim in (64, 128, 256):
        call(dim, causal=False)
    return len(problems) + len(CACHE_FORMS) + 3 + 2 + 3


def start(tool: str, log: Path) -> subprocess.Popen:
    options = {
        "racecheck": ["--racecheck-report", "analysis", *OURS],
        "initcheck": [],  # must see who else writes
    }.get(tool, OURS)
    command = ["compute-sanitizer", "--tool", tool, "--show-backtrace", "no", "--print-limit", "10000", *options]
    command += [sys.executable, __file__, "--worker", tool]
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)


def summarise(tool: str, text: str) -> dict[str, object]:
    """What a tool reported: its findings by kind and place, its own summary, the problems that ran."""
    lines = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    findings: dict[str, int] = {}
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if not re.match(r"(Invalid|Error|Warning|Uninitialized|Barrier|Divergent|Program hit|Race)", line):
            continue
        place = after if after.startswith(("at ", "and ")) else ""
        kind = line.split(" at ")[0] if " access at " in line else line
        kernels = re.findall(r"(\w+_kernel)\b", line + place)
        files = re.findall(r"(\w+\.cuh?:\d+)", line + place)
        if tool == "initcheck" and kernels and "selfattn" not in place:
            kernels.insert(0, "of another library")
        key = " | ".join([re.sub(r"0x[0-9a-f]+|\b\d+\b", "N", kind)[:120], *dict.fromkeys(kernels), *files])
        findings[key] = findings.get(key, 0) + 1
    summary = next((line for line in lines if "SUMMARY" in line), "none: stopped for time, or the tool failed")
    ran = re.search(r"^problems (\d+)$", text, re.MULTILINE)
    return {"tool": tool, "problems": int(ran[1]) if ran else 0, "summary": summary, "findings": findings}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tools", nargs="*", default=TOOLS, help=f"of {', '.join(TOOLS)}; all by default")
    parser.add_argument("--worker", choices=TOOLS, help="run the problems; for the tools")
    parser.add_argument("--seconds", type=float, default=500, help="for all tools together")
    parser.add_argument("--logs", type=Path, help="a folder for what the tools print")
    add_family_option(parser)
    add_record_options(parser, "sanitizers.jsonl")
    arguments = parser.parse_args()
    if arguments.worker:
        print("problems", run_forms(arguments.worker))
        return 0
    logs = arguments.logs or Path(tempfile.mkdtemp())
    running = {tool: start(tool, logs / f"{tool}.log") for tool in arguments.tools}
    deadline, bad = time.time() + arguments.seconds, 0
    for tool, process in running.items():
        try:
            process.wait(max(1.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
        text = (logs / f"{tool}.log").read_text()
        record = {**summarise(tool, text), **describe_run(arguments.commit)}
        bad += bool(record["findings"]) or record["problems"] == 0
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(json.dumps(record, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
