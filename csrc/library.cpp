// Every schema of the library, on one screen. Implementations register themselves at the end of their own files.
//
// Saved TorchScript and AOTInductor packages depend on these strings: extend one with trailing defaulted keyword
// arguments or a new overload, never change it.
#include <ATen/core/enum_tag.h>
#include <torch/library.h>

#include "common/dense_tensor.h"

#define SELFATTN_QKV "Tensor q, Tensor k, Tensor v"
#define SELFATTN_PAIRS "Tensor? segment_ids=None, bool causal=True, float? qk_scale=None"
#define SELFATTN_KEYWORDS "Tensor? kv_segment_ids=None, int window_left=-1, int window_right=-1, float softcap=0.0"
#define SELFATTN_POSITIONS "Tensor? positions=None, Tensor? kv_positions=None"
#define SELFATTN_KERNEL_POSITIONS SELFATTN_POSITIONS ", bool in_order=False"
#define SELFATTN_CALL                                                              \
  SELFATTN_QKV ", " SELFATTN_PAIRS ", str backend=\"auto\", *, " SELFATTN_KEYWORDS \
               ", Tensor? sinks=None, " SELFATTN_POSITIONS
// Attention over a KV cache
#define SELFATTN_CACHES "Tensor k_cache, Tensor v_cache"
#define SELFATTN_WRITTEN_CACHES "Tensor(a!) k_cache, Tensor(b!) v_cache"
#define SELFATTN_CACHE_ROWS "Tensor? page_table=None, Tensor? segment_ids=None"
#define SELFATTN_CACHE_SCALES "Tensor? k_scale=None, Tensor? v_scale=None"
#define SELFATTN_CACHE_PAIRS \
  "Tensor q, " SELFATTN_CACHES ", Tensor lengths, " SELFATTN_CACHE_ROWS ", bool causal=True, float? qk_scale=None"
#define SELFATTN_CACHE_KEYWORDS                                                                              \
  "Tensor? positions=None, int window_left=-1, int window_right=-1, float softcap=0.0, Tensor? sinks=None, " \
  "Tensor? draft_mask=None, " SELFATTN_CACHE_SCALES ", int split_keys=0"
#define SELFATTN_CACHE_CALL SELFATTN_CACHE_PAIRS ", str backend=\"auto\", *, " SELFATTN_CACHE_KEYWORDS
#define SELFATTN_NORM_ROPE \
  "Tensor? q_weight=None, Tensor? k_weight=None, Tensor? freqs_sin=None, Tensor? freqs_cos=None"
#define SELFATTN_NORM_ROPE_CALL                                                                                     \
  SELFATTN_NORM_ROPE                                                                                                \
  ", *, bool norm=True, float eps=1e-06, bool rope=True, Tensor? positions=None, float theta=10000.0, str pairing=" \
  "\"interleaved\""
#define SELFATTN_NORM_ROPE_ATTENTION                                                                            \
  "float eps=1e-06, float theta=10000.0, str pairing=\"interleaved\", bool causal=True, float? qk_scale=None, " \
  "int window_left=-1, int window_right=-1, float softcap=0.0"

#define SELFATTN_LAYER                                                                                               \
  "Tensor? q_norm_weight=None, Tensor? k_norm_weight=None, Tensor? sinks=None, Tensor? freqs_sin=None, Tensor? "     \
  "freqs_cos=None, Tensor? segment_ids=None, *, int head_dim, float norm_eps=1e-06, float rope_theta=10000.0, str "  \
  "rope_pairing=\"interleaved\", bool causal=True, float? qk_scale=None, str backend=\"auto\", int window_left=-1, " \
  "int "                                                                                                             \
  "window_right=-1, float softcap=0.0"

// A layer's cache: `lengths` are those before the call.
#define SELFATTN_LAYER_CACHE                                   \
  SELFATTN_LAYER ", bool rope=True, " SELFATTN_WRITTEN_CACHES  \
                 ", Tensor lengths, Tensor? page_table=None, " \
                 "Tensor? positions=None, Tensor? draft_mask=None, int split_keys=0, " SELFATTN_CACHE_SCALES

// Rows spread over ranks
#define SELFATTN_CONTEXT_CALL                                                                                       \
  SELFATTN_QKV                                                                                                      \
  ", Tensor segment_ids, Tensor kv_segment_ids, *, Tensor positions, Tensor kv_positions, int shared, int "         \
  "group_size, str group_name, str method=\"auto\", bool causal=True, float? qk_scale=None, str backend=\"auto\", " \
  "int "                                                                                                            \
  "window_left=-1, int window_right=-1, float softcap=0.0, Tensor? sinks=None, int local_start=0, bool "            \
  "documents_are_runs=False, str heads_group_name=\"\", int heads_group_size=1, Tensor? kv_order=None"

#define SELFATTN_ROPE_TYPE                                                                                  \
  "str rope_type=\"default\", float rope_theta=10000.0, SymInt? length=None, float? factor=None, "          \
  "int? original_max_position_embeddings=None, float? low_freq_factor=None, float? high_freq_factor=None, " \
  "float? attention_factor=None, float? beta_fast=None, float? beta_slow=None, float? mscale=None, "        \
  "float? mscale_all_dim=None, bool? truncate=None, float[]? short_factor=None, float[]? long_factor=None"

TORCH_LIBRARY(selfattn, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  // Attention
  m.def("multihead_attention(" SELFATTN_CALL ") -> Tensor", tags);
  m.def("multihead_attention_lse(" SELFATTN_CALL ") -> (Tensor out, Tensor lse)", tags);
  m.def("explain_backend(" SELFATTN_CALL ") -> str", tags);
  m.def("merge_attention(Tensor out, Tensor lse, Tensor other_out, Tensor other_lse) -> (Tensor out, Tensor lse)",
        tags);
  m.def("flash_attention(" SELFATTN_QKV ", " SELFATTN_PAIRS ", *, " SELFATTN_KEYWORDS
        ", Tensor? sinks=None, " SELFATTN_KERNEL_POSITIONS ") -> (Tensor out, Tensor lse)",
        tags);
  m.def("flash_attention_backward(Tensor grad_out, Tensor? grad_lse, " SELFATTN_QKV
        ", Tensor out, Tensor lse, " SELFATTN_PAIRS ", *, " SELFATTN_KEYWORDS ", " SELFATTN_KERNEL_POSITIONS
        ") -> (Tensor dq, Tensor dk, Tensor dv)",
        tags);
  // Into memory that is there: dq may be out, dk may be k, dv may be v.
  m.def("flash_attention_backward.into(Tensor grad_out, Tensor? grad_lse, " SELFATTN_QKV
        ", Tensor out, Tensor lse, " SELFATTN_PAIRS ", *, " SELFATTN_KEYWORDS
        ", Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, " SELFATTN_KERNEL_POSITIONS ") -> ()",
        tags);
  // Attention over a KV cache
  m.def("attention_with_kv_cache(" SELFATTN_CACHE_CALL ") -> Tensor", tags);
  m.def("attention_with_kv_cache_lse(" SELFATTN_CACHE_CALL ") -> (Tensor out, Tensor lse)", tags);
  m.def("explain_kv_cache_backend(" SELFATTN_CACHE_CALL ") -> str", tags);
  m.def("flash_attention_kv_cache(" SELFATTN_CACHE_PAIRS ", *, " SELFATTN_CACHE_KEYWORDS
        ") -> (Tensor out, Tensor lse)",
        tags);
  m.def("append_kv_cache(Tensor k, Tensor v, Tensor positions, " SELFATTN_CACHE_ROWS ", *, " SELFATTN_WRITTEN_CACHES
        ", " SELFATTN_CACHE_SCALES ") -> ()",
        tags);
  m.def("qk_norm_rope_append(" SELFATTN_QKV ", Tensor positions, " SELFATTN_CACHE_ROWS ", " SELFATTN_NORM_ROPE
        ", *, " SELFATTN_WRITTEN_CACHES
        ", bool norm=True, float eps=1e-06, bool rope=True, float theta=10000.0, str "
        "pairing=\"interleaved\", " SELFATTN_CACHE_SCALES ") -> Tensor",
        tags);
  // What reads a cache's integers, with the checks of their values: the slot of each token, that and the lengths after
  // an append, and the pages in use.
  m.def(
      "kv_cache_positions(Tensor lengths, Tensor? segment_ids, SymInt num_queries, SymInt capacity, "
      "Tensor? positions=None) -> Tensor",
      tags);
  m.def(
      "positions_of_append(Tensor lengths, Tensor? segment_ids, SymInt num_tokens, SymInt capacity, "
      "Tensor? positions=None) -> (Tensor lengths, Tensor positions)",
      tags);
  m.def("kv_cache_pages(Tensor page_table, Tensor is_used, SymInt pages) -> Tensor", tags);
  m.def("lengths_after_append(Tensor lengths, Tensor? segment_ids, SymInt num_tokens) -> Tensor", tags);
  // Segments
  m.def("segment_mask(Tensor segment_ids, Tensor? kv_segment_ids=None) -> Tensor", tags);
  m.def("segment_ids_from_positions(Tensor positions) -> Tensor", tags);
  m.def("segment_ids_from_cu_seqlens(Tensor cu_seqlens, int length) -> Tensor", tags);
  m.def("cu_seqlens_from_segment_ids(Tensor segment_ids, int max_segments) -> Tensor", tags);
  // Rows spread over ranks
  m.def(
      "context_layout(Tensor segment_ids, int group_rank, int group_size, str balance=\"documents\", int bucket=128) "
      "-> "
      "(Tensor indices, Tensor segment_ids, Tensor positions, Tensor document_positions, Tensor kv_segment_ids, Tensor "
      "kv_positions, Tensor kv_order, Tensor slots, int shared, int local_start, bool documents_are_runs)",
      tags);
  m.def("context_parallel_attention(" SELFATTN_CONTEXT_CALL ") -> Tensor", tags);
  m.def("context_parallel_attention_forward(" SELFATTN_CONTEXT_CALL
        ") -> (Tensor out, Tensor lse, Tensor shared_lse, Tensor[] exchanged)",
        tags);
  m.def(
      "context_parallel_attention_backward(Tensor grad_out, Tensor out, Tensor lse, Tensor shared_lse, "
      "Tensor[] exchanged, " SELFATTN_CONTEXT_CALL ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
      tags);
  // Rotary embedding and query-key norm
  m.def(
      "precompute_freqs(int feat_dim, Tensor? pos_idx=None, int? max_length=None, float theta=10000.0, *, "
      "ScalarType? dtype=None, Device? device=None) -> (Tensor sin, Tensor cos)",
      tags);
  // Of contexts beyond the trained one: docs/semantics.md names the types and their fields.
  m.def("rope_tables(int rotary_dim, Tensor? positions=None, SymInt? max_length=None, *, " SELFATTN_ROPE_TYPE
        ", ScalarType? dtype=None, Device? device=None) -> (Tensor sin, Tensor cos)",
        tags);
  m.def(
      "apply_rotary_emb(Tensor xq, Tensor xk, Tensor? freqs_sin=None, Tensor? freqs_cos=None, "
      "float theta=10000.0, *, str pairing=\"interleaved\") -> (Tensor xq, Tensor xk)",
      tags);
  m.def("qk_norm_rope(Tensor q, Tensor k, " SELFATTN_NORM_ROPE_CALL ") -> (Tensor q, Tensor k)", tags);
  m.def("qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor? q=None, Tensor? k=None, " SELFATTN_NORM_ROPE_CALL
        ") -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)",
        tags);
  // Over the incoming gradients, which are contiguous.
  m.def(
      "qk_norm_rope_backward.in_place(Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor? q=None, Tensor? "
      "k=None, " SELFATTN_NORM_ROPE_CALL ") -> (Tensor dq_weight, Tensor dk_weight)",
      tags);
  // Both as one, for what is kept for the gradient
  m.def("qk_norm_rope_attention(" SELFATTN_QKV ", " SELFATTN_NORM_ROPE
        ", Tensor? segment_ids=None, *, " SELFATTN_NORM_ROPE_ATTENTION
        ", Tensor? sinks=None) -> (Tensor out, Tensor lse)",
        tags);
  m.def("qk_norm_rope_attention_backward(Tensor grad_out, Tensor? grad_lse, " SELFATTN_QKV
        ", Tensor out, Tensor lse, " SELFATTN_NORM_ROPE ", Tensor? segment_ids=None, *, " SELFATTN_NORM_ROPE_ATTENTION
        ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_weight, Tensor dk_weight)",
        tags);
  // Module
  m.def(
      "self_attention(Tensor x, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor out_weight, "
      "Tensor? q_bias=None, Tensor? k_bias=None, Tensor? v_bias=None, Tensor? out_bias=None, " SELFATTN_LAYER
      ", float dropout_rate=0.0, bool training=False, bool rope=True) -> Tensor",
      tags);
  // Its parts, for layers whose projections are not plain ones: the three projections of x, and what comes between them
  // and the output projection. q, k and v are (B, S, heads * head_dim), and so is the result.
  m.def(
      "project_query_key_value(Tensor x, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor? q_bias=None, "
      "Tensor? k_bias=None, Tensor? v_bias=None) -> (Tensor q, Tensor k, Tensor v)",
      tags);
  m.def("projected_attention(" SELFATTN_QKV ", " SELFATTN_LAYER ", bool rope=True) -> Tensor", tags);
  // Both over a KV cache, to which the tokens of x are appended. Operators of their own: a packet of two overloads
  // would no longer say what is wrong with a call of one of them.
  m.def(
      "self_attention_kv_cache(Tensor x, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor out_weight, "
      "Tensor? q_bias=None, Tensor? k_bias=None, Tensor? v_bias=None, Tensor? out_bias=None, " SELFATTN_LAYER_CACHE
      ") -> Tensor",
      tags);
  m.def("projected_attention_kv_cache(" SELFATTN_QKV ", " SELFATTN_LAYER_CACHE ") -> Tensor", tags);
}

// Tensors that no kernel reads. Below the schemas, whose operators each of these lines goes through.
#define SELFATTN_REFUSE(KEY) \
  TORCH_LIBRARY_IMPL(selfattn, KEY, m) { selfattn::refuse_tensors_of_key(m); }
SELFATTN_REFUSE(AutogradNestedTensor)
SELFATTN_REFUSE(NestedTensorCPU)
SELFATTN_REFUSE(NestedTensorCUDA)
SELFATTN_REFUSE(NestedTensorMeta)
SELFATTN_REFUSE(SparseCPU)
SELFATTN_REFUSE(SparseCUDA)
SELFATTN_REFUSE(SparseMeta)
SELFATTN_REFUSE(SparseCsrCPU)
SELFATTN_REFUSE(SparseCsrCUDA)
SELFATTN_REFUSE(SparseCsrMeta)
SELFATTN_REFUSE(QuantizedCPU)
SELFATTN_REFUSE(QuantizedCUDA)
SELFATTN_REFUSE(QuantizedMeta)
SELFATTN_REFUSE(MkldnnCPU)
#undef SELFATTN_REFUSE
TORCH_LIBRARY_IMPL(selfattn, AutogradOther, m) { selfattn::check_tensors_of_other_keys(m); }
