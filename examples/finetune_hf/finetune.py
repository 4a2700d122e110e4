"""Packed LoRA fine-tuning with transformers and PEFT: trains, checks that packing changes nothing, compares speeds."""

import argparse
import itertools
import sys
import time

import torch
from checks import TOLERANCE, pack, packing_error
from documents import Document, batches, read_documents
from model import build_model
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from rich.table import Table

console = Console()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    documents = read_documents(shortest=min(48, options.longest), longest=options.longest)
    model = build_model(options.width, options.layers, options.longest, options.rank, options.device, dtype)
    model.print_trainable_parameters()

    losses = train(model, documents, options)
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    console.print(f"loss {first:.3f} -> {last:.3f} (means of {tenth} steps)")

    sample = list(itertools.islice(batches(documents, options.tokens, options.seed + 1), options.speed_steps))
    table = Table("attn_implementation", "tokens/s", "packed against alone", title=f"{options.device}, {dtype}")
    errors = {}
    for name in options.implementations:
        try:
            model.base_model.model.set_attn_implementation(name)
            errors[name] = packing_error(model, sample[0][:8])
            speed = tokens_per_second(model, sample)
        except Exception as error:  # what one implementation cannot do is a row of the table
            table.add_row(name, "-", f"does not run: {type(error).__name__}: {first_line(error)}")
            continue
        table.add_row(name, f"{speed:,.0f}", f"relative difference {errors[name]:.1e}")
    console.print(table)

    checks = {
        "the loss fell": last < first - options.least_fall,
        "selfattn: a packed row equals its documents alone": errors.get("selfattn", float("inf")) < TOLERANCE[dtype],
    }
    for name, passed in checks.items():
        console.print(f"{'passed' if passed else 'FAILED'}: {name}")
    return 0 if all(checks.values()) else 1


def train(model: PeftModel, documents: list[Document], options: argparse.Namespace) -> list[float]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=options.learning_rate)
    losses = []
    rows = itertools.islice(batches(documents, options.tokens, options.seed), options.steps)
    for row in track(rows, "fine-tuning", total=options.steps, console=console):
        loss = model(**pack(row, model.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [loss.item() for loss in losses]


def tokens_per_second(model: PeftModel, rows: list[list[Document]]) -> float:
    """Of forward and backward passes, the second time that each row is seen: the first compiles for its length."""
    packed = [pack(row, model.device) for row in rows]
    for _ in range(2):
        synchronise(model)
        start = time.perf_counter()
        for batch in packed:
            model(**batch).loss.backward()
            model.zero_grad()
    synchronise(model)
    return sum(batch["input_ids"].numel() for batch in packed) / (time.perf_counter() - start)


def synchronise(model: PeftModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:120]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=2048, help="the most in a packed row")
    parser.add_argument("--longest", type=int, default=512, help="bytes of a document")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--least-fall", type=float, default=0.3, help="of the loss, for the check")
    parser.add_argument(
        "--speed-steps", type=int, default=5, help="rows whose passes are timed for each implementation"
    )
    parser.add_argument("--implementations", nargs="+", default=["selfattn", "sdpa", "flex_attention"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on CUDA")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
