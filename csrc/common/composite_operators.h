#pragma once

namespace selfattn {

/// The operators that call others (CompositeImplicitAutograd). Keys that come before that one, and would hide it, have
/// to know them by name: when a key's kernels are registered, those of other files may not be.
constexpr const char* kCompositeOperators[] = {"multihead_attention",
                                               "multihead_attention_lse",
                                               "merge_attention",
                                               "explain_backend",
                                               "attention_with_kv_cache",
                                               "attention_with_kv_cache_lse",
                                               "explain_kv_cache_backend",
                                               "lengths_after_append",
                                               "self_attention",
                                               "self_attention_kv_cache",
                                               "projected_attention_kv_cache",
                                               "project_query_key_value",
                                               "projected_attention",
                                               "segment_mask",
                                               "segment_ids_from_positions",
                                               "segment_ids_from_cu_seqlens",
                                               "cu_seqlens_from_segment_ids",
                                               "apply_rotary_emb",
                                               "precompute_freqs",
                                               "rope_tables",
                                               "context_layout",
                                               "context_parallel_attention"};

}  // namespace selfattn
