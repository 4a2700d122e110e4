"""Promise: the benchmark over several ranks runs every set; rows say what was measured, a trace what devices did."""

import json
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT
from support.ranks import Ranks

sys.path.append(str(ROOT / "benchmarks"))

import job
import scale

CASES = [
    "all_reduce 256 KiB",
    "one document S256 H4:2",
    "one document S256 E64",
    "dense",
    "docs mean24",
    "one document S128",
]


def run_benchmark(out: Path) -> None:
    cases = [part for case in CASES for part in ("--case", case)]
    quick = ["--rounds", "1", "--ms", "1", "--pause", "0", "--commit", "abc1234", "--out", str(out)]
    arguments = scale.make_parser().parse_args([*quick, *cases])
    arguments.tiny = True
    scale.run(job.Job.begin(), arguments)


ROWS_OF_THEIR_OWN = ("FSDP2", "FSDP2, model at once", "DDP")


def test_rows_name_what_was_measured(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "scale.jsonl"
    ranks.run(run_benchmark, 2, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        assert row["commit"] == "abc1234" and row["torch"] == torch.__version__ and row["world_size"] == 2
    measured = {(row["set"], row["impl"]) for row in rows if "ms" in row}
    alone = {name: "one rank" for name in ("operator", "layer", "tensor", "step", "peers")}
    assert measured == {
        *alone.items(),
        *((name, method) for name in ("operator", "layer") for method in ("auto", "heads", "keys")),
        *(("tensor", plan) for plan in ("overlap", "serial", "sequence_parallel")),
        *(("step", spread) for spread in (*ROWS_OF_THEIR_OWN, "context 2 x FSDP2 1")),
        ("peers", "selfattn"),
        ("primitives", "alone"),
        *(("primitives", f"{what} carveout {n}") for what in ("kernel", "before", "between") for n in (0, 8, 16)),
    }
    left_out = [row for row in rows if "left_out" in row]
    assert {row["set"] for row in left_out} == {"peers", "memory"}
    assert all("needs CUDA" in row["left_out"] for row in left_out)

    times = {(row["set"], row["case"]): row["ms"] for row in rows if row["impl"] == "one rank" and "ms" in row}
    spread = [row for row in rows if row["set"] in alone and row.get("ranks") == 2 and "ms" in row]
    for row in spread:
        rows_of_ranks = 2 if row["impl"] in ROWS_OF_THEIR_OWN else 1
        expected = times[row["set"], row["case"]] * rows_of_ranks / (2 * row["ms"])
        assert row["efficiency"] == pytest.approx(expected, rel=0.01, abs=1e-3)
        assert row["set"] == "step" or row["difference"] < 1e-5
    rate = next(row for row in rows if row["impl"] == "alone")
    assert rate["busbw_gbps"] == pytest.approx(2**18 / rate["ms"] / 1e6, rel=0.1, abs=0.01)


def test_a_trace_tells_collectives_that_nothing_hides() -> None:
    events = [
        {"cat": "kernel", "name": "flash_attention_forward_kernel", "ts": 1000, "dur": 4000},
        {"cat": "kernel", "name": "ncclDevKernel_AllGather_RING_LL", "ts": 4000, "dur": 3000},
        {"cat": "kernel", "name": "ncclDevKernel_ReduceScatter", "ts": 6000, "dur": 2000},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 9000, "dur": 1000},
        {"cat": "cpu_op", "name": "nccl:all_gather", "ts": 0, "dur": 50000},
        {"ph": "M", "name": "process_name"},
    ]
    times = job.device_times(events, calls=2)
    assert times == {"kernels": 2.5, "collectives": 2.0, "exposed": 1.5, "idle": 0.5}
    assert job.device_times(events[-2:], calls=2) is None
