"""A packed row is its documents: the same loss, the same gradients of the adapters."""

import torch
from documents import Document
from peft import PeftModel
from torch import Tensor
from transformers import DataCollatorWithFlattening

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def pack(documents: list[Document], device: torch.device) -> dict[str, Tensor]:
    """One row of all documents, with the positions that tell them apart and the labels without their first tokens."""
    collate = DataCollatorWithFlattening(return_tensors="pt")
    batch = collate([{"input_ids": document["input_ids"].tolist()} for document in documents])
    return {name: tensor.to(device) for name, tensor in batch.items()}


def packing_error(model: PeftModel, documents: list[Document]) -> float:
    """The largest relative difference between the packed row and its documents alone, of the loss and of the gradient
    of every weight that learns."""
    packed, alone = _loss_and_gradients(model, [documents]), _loss_and_gradients(model, [[one] for one in documents])
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(packed, alone, strict=True))


def _loss_and_gradients(model: PeftModel, rows: list[list[Document]]) -> list[Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    targets = [sum(len(document["input_ids"]) - 1 for document in row) for row in rows]
    total, sums = torch.zeros((), device=model.device), [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    for row, of_row in zip(rows, targets, strict=True):
        loss = model(**pack(row, model.device)).loss * (of_row / sum(targets))  # transformers' loss is a mean
        total += loss.detach()
        for gradient, part in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            gradient += part
    return [total, *sums]
