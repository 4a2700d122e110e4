"""Times a training step of SelfAttention with PEFT's LoRA adapters on q and v beside the plain layer.

    python benchmarks/lora.py --rounds 5 --out benchmarks/results/lora.jsonl

    plain     every parameter of the plain layer gets a gradient
    frozen    the plain layer, its parameters frozen: the gradient of the input alone
    products  the adapters' own products: both of each, forward and backward
    lora      the adapters' parameters and the input get gradients, the layer's own are frozen

All with the gradient of the input. One JSON line each, and the ratio lora / (plain + products). The first line is the
time that a call takes to find out whether the layer is plain, in microseconds: after a wait for the device, and one
call after the other. Needs the package peft.
"""

import argparse
import json
import timeit
from typing import Any

import torch
from measure import Call, add_turn_options, describe_run, host_time, median_times, parse_with_tiny
from torch import Tensor, nn

from selfattn import SelfAttention, SelfAttentionConfig

RANK = 16


def make_calls(embedding_dim: int, head_dim: int, length: int, batch: int, device: str) -> dict[str, Call]:
    from peft import LoraConfig, get_peft_model

    placed = {"device": device, "dtype": torch.bfloat16}
    config = SelfAttentionConfig(head_dim=head_dim)
    plain, frozen, base = (SelfAttention(embedding_dim, config, **placed) for _ in range(3))
    frozen.requires_grad_(False)
    holder = nn.ModuleDict({"attention": base})
    lora = get_peft_model(holder, LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lora.to(torch.bfloat16)
    layer = lora.base_model.model["attention"]
    x = torch.randn(batch, length, embedding_dim, **placed, requires_grad=True)
    grad = torch.randn_like(x)
    mean = 512 if length > 1024 else 40
    ids = (torch.rand(batch, length, device=device) < 1 / mean).cumsum(1)
    adapters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    pairs = [(adapters[i], adapters[i + 1]) for i in range(0, len(adapters), 2)]

    def step(of: SelfAttention, leaves: list[Tensor]) -> object:
        return torch.autograd.grad(of(x, segment_ids=ids), [x, *leaves], grad)

    def products() -> object:
        outs = [nn.functional.linear(nn.functional.linear(x, down), up) for down, up in pairs]
        return torch.autograd.grad(outs, [x, *adapters], [grad] * len(outs))

    return {
        "plain": lambda: step(plain, list(plain.parameters())),
        "frozen": lambda: step(frozen, []),
        "products": products,
        "lora": lambda: step(layer, adapters),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_turn_options(parser, "lora.jsonl")
    arguments = parse_with_tiny(parser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = describe_run(arguments.commit)
    shapes = [(64, 16, 64, 2)] if arguments.tiny else [(4096, 128, 8192, 2), (4096, 128, 2048, 4)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:

        def write(row: dict[str, Any]) -> None:
            out.write(json.dumps(row | record) + "\n")
            print(json.dumps(row), flush=True)

        layer = SelfAttention(64, SelfAttentionConfig(head_dim=16, qk_norm=True))
        in_a_row = 1e6 * min(timeit.repeat(layer._is_plain, number=1000, repeat=9)) / 1000
        after_a_wait = host_time(layer._is_plain, 3000)
        write(
            {
                "case": "check of a plain layer with norms",
                "host_us": round(after_a_wait, 2),
                "host_us_in_a_row": round(in_a_row, 2),
            }
        )
        for embedding_dim, head_dim, length, batch in shapes:
            name = f"docs E{embedding_dim} D{head_dim} S{length} B{batch} rank{RANK}"
            calls = make_calls(embedding_dim, head_dim, length, batch, device)
            times = median_times(calls, arguments.rounds, arguments.pause, arguments.ms)
            for implementation, ms in times.items():
                write({"case": name, "impl": implementation, "pass": "forward+backward", "ms": round(ms, 4)})
            print(f"{name}: lora / (plain + products) {times['lora'] / (times['plain'] + times['products']):.3f}")


if __name__ == "__main__":
    main()
