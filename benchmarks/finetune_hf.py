"""Times a step of examples/finetune_hf, one packed row forward and backward, with each implementation of attention.

    python benchmarks/finetune_hf.py --rounds 5 --out benchmarks/results/finetune_hf.jsonl

One JSON line each: milliseconds, tokens/s, peak memory, and how far a packed row of the four longest documents is from
them alone (the largest relative difference of the loss and of the gradients of the adapters). Needs the group
integrations of pyproject.toml.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from measure import ROOT, add_turn_options, describe_run, median_times, parse_with_tiny, peak_bytes

sys.path.append(str(ROOT.parent / "examples" / "finetune_hf"))
from checks import pack, packing_error
from documents import batches, read_documents
from model import build_model
from peft import PeftModel
from torch import Tensor

IMPLEMENTATIONS = ("selfattn", "sdpa", "flex_attention")
RANK = 8


def make_model(implementation: str, width: int, head_dim: int, layers: int, longest: int) -> PeftModel:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)  # the same weights for each
    model = build_model(width, layers, longest, RANK, device, dtype, head_dim)
    model.base_model.model.set_attn_implementation(implementation)
    return model


def step(model: PeftModel, row: dict[str, Tensor]) -> object:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(model(**row).loss, parameters)


def measure(shape: tuple[int, int, int, int, int], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    width, head_dim, layers, tokens, longest = shape
    documents = next(batches(read_documents(shortest=48, longest=longest), tokens, seed=0))
    # The check compiles for the length of each document: few, and none that flex_attention finds too short.
    longest_documents = sorted(documents, key=lambda document: len(document["input_ids"]))[-4:]
    calls, facts = {}, {}
    for name in IMPLEMENTATIONS:
        model = make_model(name, width, head_dim, layers, longest)
        row = pack(documents, model.device)
        call = functools.partial(step, model, row)
        try:
            error = packing_error(model, longest_documents)
        except Exception as error:  # what one implementation cannot do is said, and not timed
            print(f"{name} does not run: {type(error).__name__}: {error}", flush=True)
            continue
        calls[name] = call
        facts[name] = {"packed_against_alone": float(f"{error:.1e}"), "peak_bytes": peak_bytes(call)}
        length = row["input_ids"].numel()
    for name, ms in median_times(calls, arguments.rounds, arguments.pause, arguments.ms).items():
        yield {
            "case": f"E{width} D{head_dim} {layers} layers rank{RANK} S{length} {len(documents)} documents",
            "impl": name,
            "pass": "forward+backward",
            "ms": round(ms, 3),
            "tokens_per_s": round(1e3 * length / ms),
            **facts[name],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_turn_options(parser, "finetune_hf.jsonl")
    arguments = parse_with_tiny(parser)
    record = describe_run(arguments.commit)
    # Width, head dimension, layers, tokens of a row, the longest document.
    shapes = [(64, 32, 1, 128, 48)] if arguments.tiny else [(2048, 128, 4, 16384, 2048), (2048, 128, 4, 4096, 1024)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:
        for shape in shapes:
            for row in measure(shape, arguments):
                out.write(json.dumps(row | record) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
