"""Promise: a sequence that goes through a cache in pieces of any size gives what one packed forward pass gives."""

import pytest
import torch
from support.problems import error
from torch import Tensor

import selfattn

LENGTHS = (1, 7, 16, 23)  # of the sequences, in a cache of pages of 4
PIECES = {"token_by_token": 1, "chunks": 5, "whole": 23}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 1.6e-2}


def pack(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows)[None]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{}, {"window_left": 5, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES.keys())
@pytest.mark.parametrize("backend", ("reference", "auto"))
def test_operator(backend: str, piece: int, options: dict, dtype: torch.dtype, device: str) -> None:
    q, k, v = (
        [torch.randn(length, heads, 16, device=device, dtype=dtype) for length in LENGTHS] for heads in (4, 2, 2)
    )
    ids = pack([torch.full((length, 1), row, device=device) for row, length in enumerate(LENGTHS)])[..., 0]
    expected = selfattn.multihead_attention(pack(q), pack(k), pack(v), ids, backend=backend, **options)

    cache = selfattn.KVCache.paged(
        1, 24, 4, max_sequences=4, max_length=24, num_kv_heads=2, head_dim=16, dtype=dtype, device=device
    )
    allocator = selfattn.PageAllocator(cache)
    for row, length in enumerate(LENGTHS):
        allocator.reserve(row, length)
    keys, values, lengths, table = cache.layer(0)
    outs = [[] for _ in LENGTHS]
    for first in range(0, max(LENGTHS), piece):
        steps = [row[first : first + piece] for row in q]  # ragged: sequences that have ended give nothing
        step_ids = pack([torch.full((len(step), 1), row, device=device) for row, step in enumerate(steps)])[..., 0]
        after = selfattn.lengths_after_append(lengths, step_ids, step_ids.shape[1])
        slots = selfattn.kv_cache_positions(after, step_ids, step_ids.shape[1], cache.capacity)
        step_k, step_v = (pack([row[first : first + piece] for row in rows]) for rows in (k, v))
        selfattn.append_kv_cache(step_k, step_v, slots, keys, values, table, step_ids)
        out = selfattn.attention_with_kv_cache(
            pack(steps), keys, values, after, table, step_ids, backend=backend, **options
        )
        for row, part in enumerate(out[0].split([len(step) for step in steps])):
            outs[row].append(part)
        lengths.copy_(after)
    assert lengths.tolist() == list(LENGTHS)
    assert error(pack([torch.cat(row) for row in outs]), expected) < TOLERANCE[dtype]
