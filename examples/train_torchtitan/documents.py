"""Rows of packed documents, as torchtitan's own dataloaders make them: one stream of tokens with an end after each
document, cut into rows. The documents are functions and classes of the Python standard library, as bytes."""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

EOS = 0  # no source file holds this byte
VOCABULARY = 256


class Tokenizer:
    """What the model asks of a tokenizer."""

    eos_id = EOS


def read_documents(longest: int, files: int = 60) -> list[bytes]:
    """Every function and class at the top of a module, cut to the longest."""
    documents = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]:
        text = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                documents.append((ast.get_source_segment(text, node) or "").encode()[:longest])
    return documents


def batches(documents: list[bytes], rows: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end: inputs and labels, each (rows, length)."""
    order = random.Random(seed)
    stream: list[int] = []
    size = rows * (length + 1)
    while True:
        for document in order.sample(documents, len(documents)):
            stream += [*document, EOS]
            while len(stream) >= size:
                batch = torch.tensor(stream[:size]).view(rows, length + 1)
                stream = stream[size:]
                yield batch[:, :-1], batch[:, 1:]
