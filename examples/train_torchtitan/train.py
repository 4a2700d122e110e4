"""Trains a small Llama 3 of torchtitan on packed documents with selfattn's attention, and checks itself.

torchtitan's ``Trainer`` asks for an accelerator; what it does with a model stands here in its order, to run anywhere:
convert, checkpoint, and in each step masks, forward, backward.
"""

import argparse
import sys
import time

import torch
from checks import difference_from_documents, difference_from_flex_attention
from documents import VOCABULARY, Tokenizer, batches, read_documents
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchtitan.config import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list
from torchtitan.protocols.model_converter import build_model_converters

import selfattn.integrations.torchtitan  # noqa: F401 -- registers the converter, as --experimental.custom_import does


def build_model(options: argparse.Namespace) -> Transformer:
    arguments = TransformerModelArgs(
        dim=options.width,
        n_layers=options.layers,
        n_heads=8,
        n_kv_heads=4,
        vocab_size=VOCABULARY,
        max_seq_len=options.length,
        attn_type="varlen",
        attn_mask_type="block_causal",
    )
    job = JobConfig()
    job.model.converters = ["selfattn"]  # --model.converters=selfattn
    job.activation_checkpoint.mode = "selective"
    job.activation_checkpoint.selective_ac_option = "op"
    model = Transformer(arguments)
    build_model_converters(job, None).convert(model)
    apply_ac(model, job.activation_checkpoint, op_sac_save_list=_op_sac_save_list)
    with torch.no_grad():
        model.init_weights()
    return model.to(options.device)


def loss_of(model: Transformer, tokens: Tensor, labels: Tensor) -> Tensor:
    out = model(tokens, attention_masks=model.get_attention_masks(tokens, Tokenizer))
    return cross_entropy(out.flatten(0, 1).float(), labels.flatten())


def train(model: Transformer, options: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    data = batches(read_documents(options.longest), options.rows, options.length, seed=0)
    start = time.perf_counter()
    for step in range(options.steps):
        tokens, labels = (x.to(options.device) for x in next(data))
        loss = loss_of(model, tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == options.steps - 1:
            value = loss.item()  # waits for the device
            speed = options.rows * options.length * (step + 1) / (time.perf_counter() - start)
            print(f"step {step:4}   loss {value:.3f}   {speed:,.0f} tokens/s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--longest", type=int, default=150, help="a document's most bytes")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = build_model(options)
    tokens, labels = next(batches(read_documents(options.longest), 2, options.length, seed=1))
    tokens, labels = tokens.to(options.device), labels.to(options.device)
    with torch.no_grad():
        before = loss_of(model, tokens, labels).item()
    train(model, options)
    with torch.no_grad():
        after = loss_of(model, tokens, labels).item()
    alone, theirs = difference_from_documents(model, tokens), difference_from_flex_attention(model, tokens)
    results = [
        (f"the loss of two other rows fell: {before:.3f} to {after:.3f}", after < before - 0.1),
        (f"packed rows are their documents: relative difference {alone:.1e}", alone < 1e-4),
        (f"torchtitan's flex attention gives the same: relative difference {theirs:.1e}", theirs < 1e-4),
    ]
    for text, passed in results:
        print(f"{'passed' if passed else 'FAILED'}: {text}")
    return 0 if all(passed for _, passed in results) else 1


if __name__ == "__main__":
    sys.exit(main())
