"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operators of ``torch.ops.selfattn``.

The convention is PyTorch's own for scaled_dot_product_attention (``sdpa_flop`` and ``sdpa_backward_flop`` of that
module): the matrix products that the shapes say, 2 m n k each, and nothing else. Forward these are two, Q K^T and P V;
backward five, Q K^T once more and those of dP, dV, dQ and dK. Neither causality nor a window halves them, and segment
ids, which are values, cannot be read: of packed rows the count is that of one document a row, an upper bound. Grouped
heads count as query heads. Over a KV cache every query counts with all slots of its row, since lengths are values, too.
What has no matrix product (``qk_norm_rope``, rotary embedding, converters) counts 0.

``multihead_attention``, ``multihead_attention_lse`` and ``self_attention`` are made of other operators and are counted
as these: projections as matrix products, attention as here, or as PyTorch counts the operators of ``aten``, ``cudnn``
and ``reference``. (PyTorch has no formula for its own attention kernels on the CPU: ``aten`` without a mask counts 0
there.)

Importing ``selfattn`` is enough. ``torch.utils.flop_counter`` imports Triton, so the formulas are registered when a
program imports it, and at once where it has done so before.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from selfattn._when_imported import when_imported

Shape = Sequence[int]


def attention_flops(query: Shape, key: Shape, value: Shape) -> int:
    """Of Q K^T and P V. Shapes (B, Sq, NH, DQK), (B, Skv, NKV, DQK), (B, Skv, NKV, DV)."""
    return _pairs(query, key) * 2 * (query[3] + value[3])


def attention_backward_flops(query: Shape, key: Shape, value: Shape) -> int:
    """Of Q K^T, dO V^T, P^T dO, dS K and dS^T Q."""
    return _pairs(query, key) * 2 * (3 * query[3] + 2 * value[3])


def _pairs(query: Shape, key: Shape) -> int:
    """Of a query and a key, all heads together, as if every pair were allowed."""
    return query[0] * query[2] * query[1] * key[1]


def _forward_formula(q: Shape, k: Shape, v: Shape, *arguments: Any, out_shape: Any = None, **options: Any) -> int:
    return attention_flops(q, k, v)


def _backward_formula(
    grad_out: Shape,
    grad_lse: Shape | None,
    q: Shape,
    k: Shape,
    v: Shape,
    *arguments: Any,
    out_shape: Any = None,
    **options: Any,
) -> int:
    return attention_backward_flops(q, k, v)


def _context_formula(q: Shape, k: Shape, v: Shape, *arguments: Any, **options: Any) -> int:
    return _of_rank_in_context(attention_flops, q, k, v, **options)


def _context_backward_formula(
    grad_out: Shape,
    out: Shape,
    lse: Shape,
    shared_lse: Shape,
    exchanged: Sequence[Shape],
    q: Shape,
    k: Shape,
    v: Shape,
    *arguments: Any,
    **options: Any,
) -> int:
    return _of_rank_in_context(attention_backward_flops, q, k, v, **options)


def _of_rank_in_context(
    flops: Callable[[Shape, Shape, Shape], int],
    q: Shape,
    k: Shape,
    v: Shape,
    *,
    shared: int,
    group_size: int,
    local_start: int = 0,
    heads_group_size: int = 1,
    **options: Any,
) -> int:
    """Of this rank: its tokens from ``local_start`` on with each other, and shared queries with those keys of all."""
    of_own = flops(*_with_length(q[1] - local_start, q, k, v))
    of_all = _with_length(heads_group_size * group_size * shared, k, v)
    return of_own + flops(*_with_length(shared, q), *of_all)


def _with_length(length: int, *shapes: Shape) -> list[Shape]:
    return [(shape[0], length, *shape[2:]) for shape in shapes]


def _kv_cache_formula(
    q: Shape,
    k_cache: Shape,
    v_cache: Shape,
    lengths: Shape,
    page_table: Shape | None = None,
    *arguments: Any,
    out_shape: Any = None,
    **options: Any,
) -> int:
    """Every query with every slot of its row."""
    capacity = k_cache[1] * (1 if page_table is None else page_table[1])
    return attention_flops(q, (q[0], capacity, *k_cache[2:]), (q[0], capacity, *v_cache[2:]))


def _register(flop_counter: ModuleType) -> None:
    """The formulas of every operator whose work are matrix products, all overloads together."""
    formulas = {
        torch.ops.selfattn.flash_attention: _forward_formula,
        torch.ops.selfattn.qk_norm_rope_attention: _forward_formula,
        torch.ops.selfattn.flash_attention_kv_cache: _kv_cache_formula,
        torch.ops.selfattn.flash_attention_backward: _backward_formula,
        torch.ops.selfattn.qk_norm_rope_attention_backward: _backward_formula,
        torch.ops.selfattn.context_parallel_attention_forward: _context_formula,
        torch.ops.selfattn.context_parallel_attention_backward: _context_backward_formula,
    }
    for operator, formula in formulas.items():
        if operator not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(operator)(formula)


def register() -> None:
    """Registers the formulas now, or when ``torch.utils.flop_counter`` is imported."""
    when_imported("torch.utils.flop_counter", _register)
