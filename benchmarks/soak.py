"""Thousands of random small problems on the GPU, in many fresh processes, several at a time: looks for errors that come
once in many runs.

    SELFATTN_LIBRARY=build/libselfattn.so PYTHONPATH=. python benchmarks/soak.py --problems 20000 --at-once 12

Each process draws its problems from its own seed (shapes, head dimensions, ids of every pattern and layout, windows,
sinks, scales of every sign, dtypes, deterministic mode), fills free memory with NaN, runs forward and
backward twice, and compares with the formula in float64: no error may exceed twice that of the formula in the same
precision, and the forward pass must give the same bits again. Appends one record with what was run and what failed.
``--worker SEED --problems N`` repeats one process. --family forces a family of kernels.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import add_family_option, add_record_options, describe_run
from support.memory import poison_free_memory
from support.problems import dense_attention, lay_out, make_ids
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
ID_KINDS = ["documents", "short_documents", "padding_around", "shuffled_padding", "blocks", "permuted"]
ID_KINDS += ["one_document", "all_padding"]


def draw_ids(rng: random.Random, batch: int, length: int, dtype: torch.dtype) -> Tensor:
    ids = make_ids(rng.choice(ID_KINDS), batch, length).to("cuda", dtype)
    layout = rng.choice(["plain", "transposed", "strided", "expanded"])
    if layout == "transposed":
        return ids.t().contiguous().t()
    if layout == "strided":
        wide = torch.full((batch, 3 * length), -5, dtype=dtype, device="cuda")
        wide[:, 1::3] = ids
        return wide[:, 1::3]
    return ids[:1].expand(batch, length) if layout == "expanded" else ids


def draw_rows(rng: random.Random, batch: int, length: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    rows = torch.randn(batch, length, heads, dim, device="cuda").to(dtype)
    return lay_out(rows, rng.choice(["bsnd", "bsnd", "bnsd", "padded", "odd"]))


def draw_problem(rng: random.Random) -> dict:
    """The arguments of one call; tensors from torch's generator, which the worker seeds."""
    dtype = rng.choice(DTYPES)
    batch, kv_heads = rng.randint(1, 4), rng.randint(1, 3)
    heads = kv_heads * rng.choice([1, 1, 2, 4])
    queries = rng.choice(
        [rng.randint(1, 80), rng.randint(60, 400), rng.choice([64, 128, 192, 256, 333]), rng.randint(600, 1500)]
    )
    keys = queries if rng.random() < 0.7 else rng.randint(1, 500)
    dim = rng.choice([64, 64, 128, 128, 256, 96, 192, 8, 40, 72, 136, 248])
    value_dim = dim if rng.random() < 0.8 else rng.choice([64, 128, 32, 256])
    call = {
        "q": draw_rows(rng, batch, queries, heads, dim, dtype),
        "k": draw_rows(rng, batch, keys, kv_heads, dim, dtype),
        "v": draw_rows(rng, batch, keys, kv_heads, value_dim, dtype),
        "causal": rng.random() < 0.6,
        "qk_scale": rng.choice([None, None, None, 0.3, -0.2, 0.0]),
    }
    if rng.random() < 0.75:
        id_dtype = rng.choice([torch.int32, torch.int64])
        call["segment_ids"] = draw_ids(rng, batch, queries, id_dtype)
        if keys != queries or rng.random() < 0.1:
            call["kv_segment_ids"] = draw_ids(rng, batch, keys, id_dtype)
    if rng.random() < 0.2:
        call["window_left"] = rng.randint(0, 200)
    if rng.random() < 0.1:
        call["window_right"] = rng.randint(0, 200)
    if rng.random() < 0.2:
        call["sinks"] = torch.randn(heads, device="cuda")
    return call


def run(call: dict, grad: Tensor) -> dict[str, Tensor]:
    poison_free_memory(1 << 26)  # other processes want the card too
    leaves = {name: call[name].detach().requires_grad_() for name in ("q", "k", "v")}
    arguments = {**call, **leaves}
    positional = [arguments.pop(name, None) for name in ("q", "k", "v", "segment_ids", "causal", "qk_scale")]
    out, lse = torch.ops.selfattn.flash_attention(*positional, **arguments)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    results = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    return {"out": out.detach(), "lse": lse.detach(), **results}


def faults(call: dict, grad: Tensor) -> list[str]:
    exact = dense_attention(**call, grad_out=grad)
    same = dense_attention(**call, grad_out=grad, precision=torch.float32, rounding=grad.dtype)
    first, second = run(call, grad), run(call, grad)
    found = []
    for name, mine in first.items():
        target = exact[name]
        infinite = target == -math.inf
        if not torch.equal(mine == -math.inf, infinite) or not mine[~infinite].isfinite().all():
            found.append(f"{name} is not finite where it should be")
            continue
        scale = max(target[~infinite].abs().max().item(), 1e-2) if (~infinite).any() else 1.0
        error, allowance = (
            ((tensor.double() - target)[~infinite].abs().max().item() if (~infinite).any() else 0.0) / scale
            for tensor in (mine, same[name])
        )
        if error > 2 * allowance + 2e-3:
            found.append(f"{name}: error {error:.2e} of its largest element, the same formula {allowance:.2e}")
        if not torch.equal(second[name], mine) and (
            name in ("out", "lse") or torch.are_deterministic_algorithms_enabled()
        ):
            found.append(f"{name} has other bits the second time")
    return found


def describe(call: dict) -> dict[str, object]:
    def of(value: object) -> object:
        return [list(value.shape), list(value.stride()), str(value.dtype)] if isinstance(value, Tensor) else value

    return {name: of(value) for name, value in call.items()}


def work(seed: int, problems: int) -> None:
    import selfattn  # noqa: F401

    rng = random.Random(seed)
    torch.manual_seed(seed)
    for number in range(problems):
        call = draw_problem(rng)
        torch.use_deterministic_algorithms(rng.random() < 0.2)
        q, v = call["q"], call["v"]
        grad = torch.randn(*q.shape[:3], v.shape[-1], device="cuda").to(q.dtype)
        try:
            found = faults(call, grad)
        except Exception as error:  # a CUDA error ends this process's usefulness
            print(
                json.dumps({"seed": seed, "number": number, "error": str(error)[:300], "call": describe(call)}),
                flush=True,
            )
            raise
        for fault in found:
            print(json.dumps({"seed": seed, "number": number, "fault": fault, "call": describe(call)}), flush=True)
    print(json.dumps({"seed": seed, "done": problems}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=20000, help="of all processes together")
    parser.add_argument("--each", type=int, default=200, help="problems a process")
    parser.add_argument("--at-once", type=int, default=12, help="processes on the card")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="starts no process later than this")
    parser.add_argument("--worker", type=int, help="work as the process of this seed")
    add_family_option(parser)
    add_record_options(parser, "soak.jsonl")
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker, arguments.problems)
        return 0
    start, running, lines, crashed, done, started = time.time(), {}, [], [], 0, 0
    wanted = math.ceil(arguments.problems / arguments.each)
    while running or (started < wanted and time.time() - start < arguments.seconds):
        while len(running) < arguments.at_once and started < wanted and time.time() - start < arguments.seconds:
            seed = arguments.seed + started
            command = [sys.executable, __file__, "--worker", str(seed), "--problems", str(arguments.each)]
            log = Path(f"/tmp/soak_{os.getpid()}_{seed}.log")
            running[seed] = (subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT), log)
            started += 1
        for seed, (process, log) in list(running.items()):
            if process.poll() is None:
                continue
            text = log.read_text().splitlines()
            records = [json.loads(line) for line in text if line.startswith('{"seed"')]
            done += sum(record.get("done", 0) for record in records)
            lines += [record for record in records if "done" not in record]
            if process.returncode:
                crashed.append({"seed": seed, "code": process.returncode, "end": text[-3:]})
            log.unlink()
            del running[seed]
        time.sleep(0.05)
    record = {
        "problems": done,
        "processes": started,
        "at_once": arguments.at_once,
        "seconds": round(time.time() - start),
    }
    record |= {
        "faults": lines[:50],
        "count_of_faults": len(lines),
        "crashed": crashed,
        **describe_run(arguments.commit),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:
        out.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1)[:6000])
    return 1 if lines or crashed else 0


if __name__ == "__main__":
    sys.exit(main())
