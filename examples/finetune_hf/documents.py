"""Documents of many lengths, as bytes: the functions and classes of the Python standard library's modules."""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
Document = dict[str, Tensor]
"""``input_ids`` alone, (S,)."""


def read_documents(shortest: int, longest: int, files: int = 60) -> list[Document]:
    """Every function and class at the top of a module, cut to the longest; shorter ones are left out."""
    documents = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]:
        text = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                source = (ast.get_source_segment(text, node) or "").encode()[:longest]
                if len(source) >= shortest:
                    documents.append({"input_ids": torch.tensor(list(source))})
    return documents


def batches(documents: list[Document], tokens: int, seed: int) -> Iterator[list[Document]]:
    """Without end: documents in random order, as many as fit into the tokens of a step."""
    order = random.Random(seed)
    batch, used = [], 0
    while True:
        for document in order.sample(documents, len(documents)):
            length = len(document["input_ids"])
            if batch and used + length > tokens:
                yield batch
                batch, used = [], 0
            batch.append(document)
            used += length
