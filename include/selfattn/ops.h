#pragma once

/// The operators as C++ functions. Each calls torch.ops.selfattn.NAME through the dispatcher, so autograd, autocast
/// and tracing see the same operator as from Python. docs/semantics.md says what they compute.
///
/// Shapes: B batch, S (or Sq, Skv) tokens, NH query heads, NKV key/value heads, DQK and DV head dimensions.
/// Errors: c10::TypeError for a wrong dtype or device, c10::ValueError for a wrong shape or number,
/// c10::NotImplementedError for a backend that cannot serve; each names the argument, what was expected and what came.

#include <optional>
#include <string>
#include <tuple>

#include <ATen/core/Tensor.h>
#include <selfattn/backend.h>
#include <selfattn/export.h>
#include <torch/arg.h>

namespace selfattn {

/// What a call of multihead_attention may leave out.
struct AttentionOptions {
  /// (B, S) int32 or int64: equal ids attend to each other, in any order; a negative id is padding.
  TORCH_ARG(std::optional<at::Tensor>, segment_ids);
  /// Whether a query attends only to keys at or before it (bottom-right aligned where Sq != Skv).
  TORCH_ARG(bool, causal) = true;
  /// What the scores are multiplied by; 1 / sqrt(DQK) where not given.
  TORCH_ARG(std::optional<double>, qk_scale);
  /// "auto", a backend's name or an alias (see parse_backend).
  TORCH_ARG(std::string, backend) = "auto";
  /// (B, Skv) int32 or int64 ids of the keys, where they differ from segment_ids.
  TORCH_ARG(std::optional<at::Tensor>, kv_segment_ids);
  /// How many keys to the left of a query it may attend to; -1: all.
  TORCH_ARG(int64_t, window_left) = -1;
  TORCH_ARG(int64_t, window_right) = -1;  ///< the same to the right
  /// c > 0: a score s becomes c * tanh(s / c). 0: none.
  TORCH_ARG(double, softcap) = 0.0;
  /// (NH,): one more logit a head in the softmax's denominator.
  TORCH_ARG(std::optional<at::Tensor>, sinks);
  /// (B, Sq) int32 or int64: what causality and windows compare in the place of i + Skv - Sq, in any order.
  TORCH_ARG(std::optional<at::Tensor>, positions);
  /// (B, Skv): the same of the keys; `positions` where not given, and then Sq == Skv.
  TORCH_ARG(std::optional<at::Tensor>, kv_positions);
};

/// Exact attention. q (B, Sq, NH, DQK), k (B, Skv, NKV, DQK), v (B, Skv, NKV, DV) -> (B, Sq, NH, DV).
SELFATTN_API at::Tensor multihead_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                            const AttentionOptions& options = {});

/// The same, and the logsumexp of each row's logits (B, NH, Sq) float32, differentiable.
SELFATTN_API std::tuple<at::Tensor, at::Tensor> multihead_attention_lse(const at::Tensor& q, const at::Tensor& k,
                                                                        const at::Tensor& v,
                                                                        const AttentionOptions& options = {});

/// One line a backend: chosen, able, or every reason why it cannot serve this call.
SELFATTN_API std::string explain_backend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                         const AttentionOptions& options = {});

/// Two partial results of multihead_attention_lse over disjoint keys as the result over all of them: out, other_out
/// (B, Sq, NH, DV), lse, other_lse (B, NH, Sq) -> out in its dtype, lse. Differentiable any number of times; rows
/// without keys (lse -inf) in either part or both are merged too. Sinks may be counted in one part alone.
SELFATTN_API std::tuple<at::Tensor, at::Tensor> merge_attention(const at::Tensor& out, const at::Tensor& lse,
                                                                const at::Tensor& other_out,
                                                                const at::Tensor& other_lse);

/// What a call of attention_with_kv_cache may leave out. R rows of the cache, each a sequence.
struct KVCacheAttentionOptions {
  /// (R, pages of a row) int32 or int64: slot s of row r is slot s % page_size of page page_table[r, s / page_size].
  /// Where not given, row r is page r. An entry whose page holds nothing that a query sees may have any value.
  TORCH_ARG(std::optional<at::Tensor>, page_table);
  /// (B, Sq) int32 or int64: the row of each query; negative is padding. Row b for batch b where not given.
  TORCH_ARG(std::optional<at::Tensor>, segment_ids);
  /// Whether a query sees only slots at or before its position.
  TORCH_ARG(bool, causal) = true;
  /// What the scores are multiplied by; 1 / sqrt(DQK) where not given.
  TORCH_ARG(std::optional<double>, qk_scale);
  /// "auto", a backend's name or an alias (see parse_backend).
  TORCH_ARG(std::string, backend) = "auto";
  /// (B, Sq) int32 or int64: the slot at which each query stands; where not given, lengths[row] - (queries of that row
  /// at or after it).
  TORCH_ARG(std::optional<at::Tensor>, positions);
  /// How many slots to the left of its position a query sees; -1: all.
  TORCH_ARG(int64_t, window_left) = -1;
  TORCH_ARG(int64_t, window_right) = -1;  ///< the same to the right
  /// c > 0: a score s becomes c * tanh(s / c). 0: none.
  TORCH_ARG(double, softcap) = 0.0;
  /// (NH,): one more logit a head in the softmax's denominator.
  TORCH_ARG(std::optional<at::Tensor>, sinks);
  /// (B, Sq, Sq) bool, Sq <= 32: what is seen of the last Sq slots of a row, in the place of causality.
  TORCH_ARG(std::optional<at::Tensor>, draft_mask);
  /// Slots of a partial result, a multiple of 64, or 0: the kernel's choice.
  TORCH_ARG(int64_t, split_keys) = 0;
};

/// Exact attention to a KV cache that holds the keys and values of the queries already: q (B, Sq, NH, DQK), k_cache (P,
/// page_size, NKV, DQK), v_cache (P, page_size, NKV, DV), lengths (R,) int32 or int64 with the tokens of this call ->
/// (B, Sq, NH, DV). Reads no value on the host: ones out of range are c10::ValueError on the CPU, an assertion on CUDA.
SELFATTN_API at::Tensor attention_with_kv_cache(const at::Tensor& q, const at::Tensor& k_cache,
                                                const at::Tensor& v_cache, const at::Tensor& lengths,
                                                const KVCacheAttentionOptions& options = {});

/// The same, and the logsumexp of each row's logits (B, NH, Sq) float32.
SELFATTN_API std::tuple<at::Tensor, at::Tensor> attention_with_kv_cache_lse(
    const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& lengths,
    const KVCacheAttentionOptions& options = {});

/// One line a backend: chosen, able, or every reason why it cannot serve this call.
SELFATTN_API std::string explain_kv_cache_backend(const at::Tensor& q, const at::Tensor& k_cache,
                                                  const at::Tensor& v_cache, const at::Tensor& lengths,
                                                  const KVCacheAttentionOptions& options = {});

/// Writes k (B, S, NKV, DQK) and v (B, S, NKV, DV) at the slots positions (B, S) of their rows. page_table and
/// segment_ids as in KVCacheAttentionOptions; a token of a negative id is not written. Not differentiable: under
/// torch::NoGradGuard where a tensor requires a gradient.
SELFATTN_API void append_kv_cache(const at::Tensor& k, const at::Tensor& v, const at::Tensor& positions,
                                  const at::Tensor& k_cache, const at::Tensor& v_cache,
                                  const std::optional<at::Tensor>& page_table = std::nullopt,
                                  const std::optional<at::Tensor>& segment_ids = std::nullopt);

/// lengths (R,) after a call whose tokens, of the rows segment_ids (B, S) or num_tokens of each, are appended.
SELFATTN_API at::Tensor lengths_after_append(const at::Tensor& lengths, const std::optional<at::Tensor>& segment_ids,
                                             int64_t num_tokens);

/// The slots (B, S) int64 of a call's tokens, of the rows segment_ids (B, S) or num_tokens of each: the last ones of
/// lengths (R,), which count them; -1 for a token of no row. `capacity`: slots of a row.
SELFATTN_API at::Tensor kv_cache_positions(const at::Tensor& lengths, const std::optional<at::Tensor>& segment_ids,
                                           int64_t num_tokens, int64_t capacity);

/// (B, Sq), (B, Skv) -> bool (B, 1, Sq, Skv): True where ids are equal and not negative.
SELFATTN_API at::Tensor segment_mask(const at::Tensor& segment_ids,
                                     const std::optional<at::Tensor>& kv_segment_ids = std::nullopt);

/// positions (B, S) -> ids (B, S) int32: a document starts where a position is not its left neighbour's + 1.
SELFATTN_API at::Tensor segment_ids_from_positions(const at::Tensor& positions);

/// cu_seqlens (N + 1,) -> ids (length,) int32; tokens past the last boundary get -1.
SELFATTN_API at::Tensor segment_ids_from_cu_seqlens(const at::Tensor& cu_seqlens, int64_t length);

/// ids (B, S) -> the boundaries of each row's runs of equal ids (B, max_segments + 1) int32, the tail repeating S.
SELFATTN_API at::Tensor cu_seqlens_from_segment_ids(const at::Tensor& segment_ids, int64_t max_segments);

/// What a call of precompute_freqs may leave out. Exactly one of pos_idx and max_length is given.
struct FreqsOptions {
  TORCH_ARG(std::optional<at::Tensor>, pos_idx);    ///< (S,) or (B, S)
  TORCH_ARG(std::optional<int64_t>, max_length);    ///< positions 0 .. max_length - 1
  TORCH_ARG(double, theta) = 10000.0;               ///< base of the frequencies
  TORCH_ARG(std::optional<at::ScalarType>, dtype);  ///< float32 where not given
  TORCH_ARG(std::optional<at::Device>, device);     ///< that of pos_idx, or the CPU, where not given
};

/// Rotary tables (sin, cos), each (1 or B, S, feat_dim / 2): angle = position / theta^(2i / feat_dim)
/// (RoFormer, arXiv:2104.09864, eq. 15).
SELFATTN_API std::tuple<at::Tensor, at::Tensor> precompute_freqs(int64_t feat_dim, const FreqsOptions& options);

/// What a call of apply_rotary_emb may leave out; without tables, positions are 0 .. S - 1.
struct RotaryOptions {
  TORCH_ARG(std::optional<at::Tensor>, freqs_sin);  ///< (1 or B, S, R / 2): the first R <= D elements of a head rotate
  TORCH_ARG(std::optional<at::Tensor>, freqs_cos);  ///< (1 or B, S, R / 2)
  TORCH_ARG(double, theta) = 10000.0;               ///< base of the frequencies
  TORCH_ARG(std::string, pairing) = "interleaved";  ///< or "half", as Hugging Face stores its checkpoints
};

/// Rotates the pairs of xq (B, S, NH, D) and xk (B, S, NKV, D) by the angle of their position.
SELFATTN_API std::tuple<at::Tensor, at::Tensor> apply_rotary_emb(const at::Tensor& xq, const at::Tensor& xk,
                                                                 const RotaryOptions& options = {});

/// What a call of qk_norm_rope may leave out.
struct QkNormRopeOptions {
  TORCH_ARG(std::optional<at::Tensor>, q_weight);   ///< (D,)
  TORCH_ARG(std::optional<at::Tensor>, k_weight);   ///< (D,)
  TORCH_ARG(std::optional<at::Tensor>, freqs_sin);  ///< as in RotaryOptions
  TORCH_ARG(std::optional<at::Tensor>, freqs_cos);  ///< both or neither
  TORCH_ARG(bool, norm) = true;                     ///< whether to normalise
  TORCH_ARG(double, eps) = 1e-6;                    ///< added to the mean square
  TORCH_ARG(bool, rope) = true;                     ///< whether to rotate
  TORCH_ARG(std::optional<at::Tensor>, positions);  ///< (1 or B, S), where the tables are not given
  TORCH_ARG(double, theta) = 10000.0;               ///< base of the frequencies
  TORCH_ARG(std::string, pairing) = "interleaved";  ///< as in RotaryOptions
};

/// RMSNorm over the head dimension of q (B, S, NH, D) and k (B, S, NKV, D), then the rotary embedding.
SELFATTN_API std::tuple<at::Tensor, at::Tensor> qk_norm_rope(const at::Tensor& q, const at::Tensor& k,
                                                             const QkNormRopeOptions& options = {});

/// qk_norm_rope and append_kv_cache as one: the normalised and rotated k (B, S, NKV, D) and v (B, S, NKV, DV) are
/// written, and q (B, S, NH, D) is given back. positions (B, S) are slots, and what is rotated by where the options
/// have no tables; those of the options must not be given.
SELFATTN_API at::Tensor qk_norm_rope_append(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                            const at::Tensor& positions, const at::Tensor& k_cache,
                                            const at::Tensor& v_cache, const QkNormRopeOptions& options = {},
                                            const std::optional<at::Tensor>& page_table = std::nullopt,
                                            const std::optional<at::Tensor>& segment_ids = std::nullopt);

}  // namespace selfattn
