"""The products at both ends of a tensor-parallel layer, with the communication that runs beside them.

Between them each rank computes with its own heads, and nothing is communicated. The gradient of the input is a sum over
ranks; its collective starts as soon as the input's products are there, and runs beside those of the weights.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from selfattn.distributed._collectives import RankGroup

_LEAST_TOKENS_OF_HALF = 1024
"""Below it the start of a second collective costs more than what it hides."""


class ProjectInput(torch.autograd.Function):
    """q, k and v of this rank's heads, from an input that every rank has, or a shard of the sequence of each.

    Gradients of what every rank holds whole are sums over ranks, too: the input's, those of the norms' weights, which
    pass through here for that alone, and those of key and value projections with fewer heads than ranks, of which a
    rank uses ``kv_rows``: the first and how many.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        group: RankGroup,
        shards_sequence: bool,
        kv_rows: tuple[int, int] | None,
        x: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        v_weight: Tensor,
        q_bias: Tensor | None,
        k_bias: Tensor | None,
        v_bias: Tensor | None,
        q_norm_weight: Tensor | None,
        k_norm_weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(x, q_weight, k_weight, v_weight)
        ctx.group, ctx.shards_sequence, ctx.kv_rows = group, shards_sequence, kv_rows
        if shards_sequence:
            x = group.gather(x)
        q = torch.nn.functional.linear(x, q_weight, q_bias)
        k = torch.nn.functional.linear(x, _own(k_weight, kv_rows), _own(k_bias, kv_rows))
        v = torch.nn.functional.linear(x, _own(v_weight, kv_rows), _own(v_bias, kv_rows))
        norms = (None if weight is None else weight.view_as(weight) for weight in (q_norm_weight, k_norm_weight))
        return q, k, v, *norms

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dq_norm: Tensor | None,
        dk_norm: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x, q_weight, k_weight, v_weight = ctx.saved_tensors
        group, kv_rows = ctx.group, ctx.kv_rows
        needs_x, *needs = ctx.needs_input_grad[3:]
        gathered = group.start_gather(x) if ctx.shards_sequence else x

        dq, dk, dv = (grad.flatten(0, 1) for grad in (dq, dk, dv))
        dx = None
        if needs_x:
            rows = dq.mm(q_weight).addmm_(dk, _own(k_weight, kv_rows)).addmm_(dv, _own(v_weight, kv_rows))
            rows = rows.view(*x.shape[:1], -1, x.shape[2])
            dx = group.start_scatter(rows) if ctx.shards_sequence else group.start_sum(rows)

        rows = (group.join_shards(group.finish(gathered)) if ctx.shards_sequence else x).flatten(0, 1)

        def weight_gradient(grad: Tensor, is_needed: bool) -> Tensor | None:
            return grad.t().mm(rows) if is_needed else None

        def bias_gradient(grad: Tensor, is_needed: bool) -> Tensor | None:
            return grad.sum(0) if is_needed else None

        keys = [weight_gradient(dk, needs[1]), weight_gradient(dv, needs[2])]
        keys += [bias_gradient(dk, needs[4]), bias_gradient(dv, needs[5])]
        norms = [dq_norm.clone() if needs[6] else None, dk_norm.clone() if needs[7] else None]
        if kv_rows is None:
            norms = _start_sums(group, norms)
        else:
            keys_and_norms = _start_sums(group, [_padded(grad, kv_rows, k_weight.shape[0]) for grad in keys] + norms)
            keys, norms = keys_and_norms[:4], keys_and_norms[4:]
        queries = [weight_gradient(dq, needs[0]), bias_gradient(dq, needs[3])]

        if dx is not None:
            dx = group.finish(dx)
        norms = _finish(group, norms)
        if kv_rows is not None:
            keys = _finish(group, keys)
        return None, None, None, dx, queries[0], keys[0], keys[1], queries[1], keys[2], keys[3], *norms


class ProjectOutput(torch.autograd.Function):
    """The output projection of this rank's heads, summed over ranks: whole on every rank, or a shard of the sequence.
    The bias is added once, behind the sum."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        group: RankGroup,
        shards_sequence: bool,
        attended: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(attended, weight)
        ctx.group, ctx.shards_sequence = group, shards_sequence
        batch, length, _ = attended.shape
        half = batch * length // 2
        if shards_sequence:
            out = group.finish(group.start_scatter(torch.nn.functional.linear(attended, weight)))
        elif group.overlaps and half >= _LEAST_TOKENS_OF_HALF and not torch.compiler.is_compiling():
            out = _project_halves(group, attended.flatten(0, 1), weight, half).view(batch, length, -1)
        else:
            out = group.finish(group.start_sum(torch.nn.functional.linear(attended, weight)))
        if bias is not None:  # in place, except that what is traced would lose its gradient
            out = out + bias if torch.compiler.is_compiling() else out.add_(bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        attended, weight = ctx.saved_tensors
        needs_attended, needs_weight, needs_bias = ctx.needs_input_grad[2:]
        if ctx.shards_sequence:
            grad = ctx.group.gather(grad)
        rows = grad.flatten(0, 1)
        d_attended = rows.mm(weight).view_as(attended) if needs_attended else None
        d_weight = rows.t().mm(attended.flatten(0, 1)) if needs_weight else None
        return None, None, d_attended, d_weight, rows.sum(0) if needs_bias else None


class SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor, of which every rank then uses its own part: the gradient is a sum, too."""

    @staticmethod
    def forward(ctx: FunctionCtx, group: RankGroup, x: Tensor) -> Tensor:
        ctx.group = group
        return group.finish(group.start_sum(x.clone()))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.group.finish(ctx.group.start_sum(grad.clone()))


def _own(parameter: Tensor | None, rows: tuple[int, int] | None) -> Tensor | None:
    return parameter if rows is None or parameter is None else parameter.narrow(0, *rows)


def _padded(grad: Tensor | None, rows: tuple[int, int], total: int) -> Tensor | None:
    """The gradient of the whole parameter, from that of the rows which this rank uses."""
    if grad is None:
        return None
    whole = grad.new_zeros(total, *grad.shape[1:])
    whole.narrow(0, *rows).copy_(grad)
    return whole


def _start_sums(group: RankGroup, grads: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of one dtype go together."""
    totals = list(grads)
    for dtype in dict.fromkeys(grad.dtype for grad in grads if grad is not None):
        places = [i for i, grad in enumerate(grads) if grad is not None and grad.dtype == dtype]
        for i, total in zip(places, group.start_sums([grads[i] for i in places]), strict=True):
            totals[i] = total
    return totals


def _finish(group: RankGroup, started: list[Tensor | None]) -> list[Tensor | None]:
    return [None if total is None else group.finish(total) for total in started]


def _project_halves(group: RankGroup, rows: Tensor, weight: Tensor, half: int) -> Tensor:
    """The first half's sum runs beside the second half's product."""
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    started = []
    for part in (slice(0, half), slice(half, None)):
        torch.mm(rows[part], weight.t(), out=out[part])
        started.append(group.start_sum(out[part]))
    for total in started:
        group.finish(total)
    return out
