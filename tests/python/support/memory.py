"""Memory of the GPU: how much a call needs, and what it finds there."""

from collections.abc import Callable

import torch


def peak_of(call: Callable[[], object]) -> int:
    """Bytes above what is held before the call."""
    call()  # workspaces of libraries stay
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def poison_free_memory(largest: int = 1 << 28) -> None:
    """What the allocator hands out next holds NaN, up to that many bytes a tensor."""
    sizes = (largest, *[largest >> 5] * 8, *[largest >> 9] * 16)
    tensors = [torch.full((size // 4,), float("nan"), device="cuda") for size in sizes]
    torch.cuda.synchronize()
    del tensors
