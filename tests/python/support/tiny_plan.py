"""The training that the demo's tests run."""

import torch
from parallel import OneProcess
from training import Plan

PLAN = Plan(
    seed=3,
    steps=7,
    rows_per_step=2,
    row_length=32,
    embedding_dim=32,
    num_layers=2,
    head_dim=16,
    attention_backend="auto",
    data="made up",
)
CPU = OneProcess(torch.device("cpu"))
