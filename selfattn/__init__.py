"""Exact self-attention for PyTorch over packed documents.

One operator with native segment ids, written in C++ and CUDA, reached from Python through ``torch.ops.selfattn``.
This package is a thin shell around it: functions with the operators' names, a module, its configuration.
"""

from selfattn._library import load as _load

_load()

from selfattn.checkpointing import attention_operators  # noqa: E402
from selfattn.config import AttentionBackend, ParallelConfig, SelfAttentionConfig  # noqa: E402
from selfattn.flops import register as _register_flops  # noqa: E402
from selfattn.functional import (  # noqa: E402
    append_kv_cache,
    apply_rotary_emb,
    attention_with_kv_cache,
    attention_with_kv_cache_lse,
    cu_seqlens_from_segment_ids,
    explain_backend,
    explain_kv_cache_backend,
    kv_cache_positions,
    lengths_after_append,
    merge_attention,
    multihead_attention,
    multihead_attention_lse,
    precompute_freqs,
    qk_norm_rope,
    qk_norm_rope_append,
    segment_ids_from_cu_seqlens,
    segment_ids_from_positions,
    segment_mask,
)
from selfattn.kv_cache import KVCache, KVCacheLayer, PageAllocator  # noqa: E402
from selfattn.module import SelfAttention  # noqa: E402
from selfattn.norm import RMSNorm  # noqa: E402
from selfattn.packing_report import packing_report  # noqa: E402
from selfattn.rope import RopeParameters  # noqa: E402

_register_flops()


def __getattr__(name: str) -> object:
    if name == "decompositions":  # only exporters need it
        from selfattn._decompositions import decompositions

        return decompositions
    if name == "context_parallel_attention":  # torch.distributed takes long to import
        from selfattn.distributed import context_parallel_attention

        return context_parallel_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AttentionBackend",
    "KVCache",
    "KVCacheLayer",
    "PageAllocator",
    "ParallelConfig",
    "RMSNorm",
    "RopeParameters",
    "SelfAttention",
    "SelfAttentionConfig",
    "append_kv_cache",
    "apply_rotary_emb",
    "attention_operators",
    "attention_with_kv_cache",
    "attention_with_kv_cache_lse",
    "context_parallel_attention",
    "cu_seqlens_from_segment_ids",
    "decompositions",
    "explain_backend",
    "explain_kv_cache_backend",
    "kv_cache_positions",
    "lengths_after_append",
    "merge_attention",
    "multihead_attention",
    "multihead_attention_lse",
    "packing_report",
    "precompute_freqs",
    "qk_norm_rope",
    "qk_norm_rope_append",
    "segment_ids_from_cu_seqlens",
    "segment_ids_from_positions",
    "segment_mask",
]
