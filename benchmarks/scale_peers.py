"""The peers that scale.py times beside context parallelism: what PyTorch has for it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from job import Job
from scale_contenders import Attention, Ready, forward_backward, output_and_gradient
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor


def needs_cuda(job: Job, why: str) -> None:
    if not job.is_cuda:
        raise NotImplementedError(f"needs CUDA: {why}")


def by_heads(tensor: Tensor) -> Tensor:
    """(B, S, N, D) as (B, N, S, D), and back."""
    return tensor.transpose(1, 2)


def sdpa_ring(case: Attention, backend: str, repeats_keys: bool) -> Callable[[Job], Ready]:
    """PyTorch's own context parallelism: keys go round a ring, shards are head and tail. Of fewer key heads than query
    heads SDPA is told, or they are repeated before."""

    def make(job: Job) -> Ready:
        needs_cuda(job, "context_parallel has rings of CUDA's attention operators alone")
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._attention import context_parallel_unshard
        from torch.nn.attention import SDPBackend, sdpa_kernel

        shards = [by_heads(tensor).contiguous() for tensor in case.tensors(job)]
        with context_parallel(job.mesh, buffers=shards, buffer_seq_dims=[2] * 4, no_restore_buffers=set(shards)):
            pass
        *leaves, grad = shards

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if repeats_keys:
                k, v = (tensor.repeat_interleave(case.heads // case.key_heads, 1) for tensor in (k, v))
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])

        both_passes = forward_backward(attend, leaves, grad)

        def call() -> tuple[Tensor, ...]:
            token = torch.empty(2 * job.size, device=job.device)  # the context wants something to shard
            with context_parallel(job.mesh, buffers=[token], buffer_seq_dims=[0], no_restore_buffers={token}):
                return both_passes()

        def whole() -> Tensor:
            joined = output_and_gradient(call())
            return by_heads(context_parallel_unshard(job.mesh, [joined], [2])[0])

        return Ready(call, whole)

    return make


def flex_gathered(case: Attention) -> Callable[[Job], Ready]:
    """FlexAttention, compiled, over gathered keys, as PyTorch gathers them for it; a block mask of the shard's queries
    and all keys is made beforehand. Shards are head and tail."""

    def make(job: Job) -> Ready:
        needs_cuda(job, "FlexAttention has no backward pass on the CPU")
        from torch.distributed.tensor.experimental._context_parallel import flex_cp_allgather
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        parts = torch.arange(case.row.length, device=job.device).chunk(2 * job.size)
        order = torch.cat([torch.cat((parts[rank], parts[-1 - rank])) for rank in range(job.size)])
        own = order.chunk(job.size)[job.rank]
        ids = case.row.ids()[0].to(job.device)
        own_ids, all_ids = ids[own], ids[order]

        def is_allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (own[i] >= order[j]) & (own_ids[i] == all_ids[j])

        mask = create_block_mask(is_allowed, None, None, len(own), len(order), device=job.device, _compile=True)
        compiled = torch.compile(flex_attention, dynamic=False)
        group = job.mesh.get_group().group_name

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = flex_cp_allgather(k, v, 2, group)
            return compiled(q, k, v, block_mask=mask, enable_gqa=case.heads != case.key_heads)

        *leaves, grad = (by_heads(tensor[:, own]).contiguous() for tensor in case.tensors(job))
        call = forward_backward(attend, leaves, grad)

        def whole() -> Tensor:
            joined = all_gather_tensor(output_and_gradient(call()), 2, job.mesh)
            return by_heads(joined)[:, order.argsort()]

        return Ready(call, whole)

    return make
