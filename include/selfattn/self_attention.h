#pragma once

#include <map>
#include <optional>
#include <string>

#include <selfattn/export.h>
#include <selfattn/kv_cache.h>
#include <selfattn/rope.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

namespace selfattn {

/// What a SelfAttention is built from; the defaults of selfattn.SelfAttentionConfig in Python.
struct SELFATTN_API SelfAttentionOptions {
  /// Of a layer with so many features a token; everything else by default.
  /* implicit */ SelfAttentionOptions(int64_t embedding_dim) : embedding_dim_(embedding_dim) {}

  /// E, the features of a token; a multiple of head_dim unless num_heads is given.
  TORCH_ARG(int64_t, embedding_dim);
  TORCH_ARG(int64_t, head_dim) = 64;  ///< D, the features of a head
  /// Key/value heads; as many as query heads where not given.
  TORCH_ARG(std::optional<int64_t>, num_kv_heads);
  /// RMSNorm of each head of q and k, before the rotary embedding.
  TORCH_ARG(bool, qk_norm) = false;
  TORCH_ARG(double, norm_eps) = 1e-6;  ///< added to the mean square
  TORCH_ARG(bool, use_bias) = false;   ///< biases in the four projections
  /// Dropout of the output, in training.
  TORCH_ARG(double, dropout_rate) = 0.0;
  /// Layers of the whole model: the initial scale of out_proj follows it.
  TORCH_ARG(int64_t, num_layers) = 12;
  TORCH_ARG(std::string, attention_backend) = "auto";  ///< see parse_backend
  TORCH_ARG(bool, causal) = true;                      ///< whether a token attends only to those at or before it
  TORCH_ARG(int64_t, window_left) = -1;                ///< tokens to the left that a token sees; -1: all
  TORCH_ARG(int64_t, window_right) = -1;               ///< the same to the right
  TORCH_ARG(double, softcap) = 0.0;                    ///< c > 0: a logit s becomes c * tanh(s / c)
  /// One learned logit a head in the softmax's denominator.
  TORCH_ARG(bool, sinks) = false;
  TORCH_ARG(double, rope_theta) = 10000.0;               ///< base of the frequencies
  TORCH_ARG(std::string, rope_pairing) = "interleaved";  ///< or "half", as Hugging Face stores its checkpoints
  /// Query heads; E / head_dim where not given. Given, embedding_dim need not be a multiple of head_dim.
  TORCH_ARG(std::optional<int64_t>, num_heads);
  /// Factor of the logits; 1 / sqrt(head_dim) where not given.
  TORCH_ARG(std::optional<double>, qk_scale);
  /// Biases of the query, key and value projections; use_bias where not given.
  TORCH_ARG(std::optional<bool>, qkv_bias);
  TORCH_ARG(std::optional<bool>, out_bias);  ///< of the output projection; use_bias where not given
  /// The norms of q and k multiply by 1 + w, and the initial w is 0 (Gemma); only with qk_norm.
  TORCH_ARG(bool, norm_unit_offset) = false;
  /// What qk_norm normalises: each "head", or the whole "projection" to all heads, before the split (OLMo 2).
  TORCH_ARG(std::string, qk_norm_scope) = "head";
  /// Whether q and k are rotated; layers without position (NoPE) are not.
  TORCH_ARG(bool, rope) = true;
  /// R, the first elements of a head, those that rotate; head_dim where not given.
  TORCH_ARG(std::optional<int64_t>, rotary_dim);
  /// The rotation of long contexts. Its rotary_dim and rope_theta count; the options of those names stay as they are by
  /// default, or equal them.
  TORCH_ARG(std::optional<RopeParameters>, rope_scaling);
  /// The largest position plus 1 that "dynamic" and "longrope" frequencies are made for; S of a call where not given.
  TORCH_ARG(std::optional<int64_t>, rope_length);
};

/// Holds the weight (features,) of the RMSNorm of a head, or of a projection; the layer applies it.
class SELFATTN_API HeadNormImpl : public torch::nn::Cloneable<HeadNormImpl> {
 public:
  /// `unit_offset`: heads are multiplied by 1 + w, and the initial w is 0.
  explicit HeadNormImpl(int64_t features, bool unit_offset = false);
  /// Makes the weight anew.
  void reset() override;
  /// Name and features.
  void pretty_print(std::ostream& stream) const override;
  /// What normalised heads are multiplied by: the weights, or 1 + w in at least float32.
  torch::Tensor factor() const;

  torch::Tensor weight;  ///< (features,)

 private:
  int64_t features_;
  bool unit_offset_;
};
TORCH_MODULE(HeadNorm);

/// Multi-head self-attention over packed documents: projections, optional query-key norm, rotary embedding, attention
/// inside each segment, output projection, dropout. Parameter names are those of selfattn.SelfAttention in Python, so a
/// state dict moves between the two.
class SELFATTN_API SelfAttentionImpl : public torch::nn::Cloneable<SelfAttentionImpl> {
 public:
  /// Throws c10::ValueError that names the option, what was expected and what came.
  explicit SelfAttentionImpl(SelfAttentionOptions options);

  /// Makes every parameter anew; may be called again.
  void reset() override;

  /// q, k, v: normal with standard deviation sqrt(2 / (5 E)) (small init: Nguyen and Salazar, arXiv:1910.05895); out:
  /// normal with 2 / (2 num_layers) / sqrt(E), two residual blocks a layer (Wang and Komatsuzaki 2021,
  /// mesh-transformer-jax). Both as GPT-NeoX has them (arXiv:2204.06745). Biases and sinks 0, norm weights 1.
  void reset_parameters();

  /// x (B, S, E) -> (B, S, E). freqs_sin, freqs_cos (1 or B, S, R / 2): rotary tables, of rope_tables(); positions
  /// 0 .. S - 1 where not given. segment_ids (B, S): one document where not given.
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& freqs_sin = {},
                        const torch::Tensor& freqs_cos = {}, const torch::Tensor& segment_ids = {});

  /// The same over a KV cache (KVCache::layer), under torch::NoGradGuard: keys and values of the tokens are written
  /// behind the lengths of their rows, and then read; the lengths stay what they are (KVCache::advance). segment_ids
  /// are the rows of the cache, row b for batch b where not given; tables those of the tokens' slots where not given.
  /// Under a name of its own: a Sequential takes modules that have one forward.
  torch::Tensor forward_with_cache(const torch::Tensor& x, const KVCacheLayer& cache,
                                   const torch::Tensor& freqs_sin = {}, const torch::Tensor& freqs_cos = {},
                                   const torch::Tensor& segment_ids = {});

  /// Puts `module` in the place of a projection or a norm: "q_proj", "k_proj", "v_proj", "out_proj", "q_norm" or
  /// "k_norm". From then on forward calls it, with a tensor for a tensor: (B, S, features) for a projection, (B, S,
  /// heads, head_dim) for a norm of heads. It may hold what was there before (an adapter). Module::replace_module
  /// alone, of whose module nobody knows how to call it, is an error in the next forward.
  void replace(const std::string& name, torch::nn::AnyModule module);

  /// Whether forward is one operator: nothing has been replaced, and no norm is one of whole projections.
  bool is_plain() const { return replaced_.empty() && !normalises_projections(); }

  /// Whether a projection or norm has been replaced.
  bool is_replaced() const { return !replaced_.empty(); }

  /// Name and options.
  void pretty_print(std::ostream& stream) const override;

  /// How q and k are rotated where forward is not given tables: for tables of other positions.
  RopeParameters rope_parameters() const;

  /// Whether tables are made for a call without them: operators rotate whole heads by rope_theta alone.
  bool makes_tables() const { return options.rope() && (options.rotary_dim() || options.rope_scaling()); }

  /// NH, query heads.
  int64_t num_heads() const { return options.num_heads().value_or(options.embedding_dim() / options.head_dim()); }
  /// NKV, key and value heads.
  int64_t num_kv_heads() const { return options.num_kv_heads().value_or(num_heads()); }

  SelfAttentionOptions options;         ///< what it was built from
  torch::nn::Linear q_proj{nullptr};    ///< weight (NH D, E)
  torch::nn::Linear k_proj{nullptr};    ///< weight (NKV D, E)
  torch::nn::Linear v_proj{nullptr};    ///< weight (NKV D, E)
  torch::nn::Linear out_proj{nullptr};  ///< weight (E, NH D)
  HeadNorm q_norm{nullptr};             ///< null without qk_norm
  HeadNorm k_norm{nullptr};             ///< null without qk_norm
  torch::Tensor sinks;                  ///< (NH,), undefined without sinks

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())}, {2, torch::nn::AnyValue(torch::Tensor())},
                           {3, torch::nn::AnyValue(torch::Tensor())})

 private:
  bool normalises_projections() const { return options.qk_norm() && options.qk_norm_scope() == "projection"; }
  void check_children() const;
  /// `cache` may be null. `positions` (B, S) are what tables are made of, where they have to be; undefined: 0 .. S - 1.
  torch::Tensor forward_at(const torch::Tensor& x, const torch::Tensor& positions, torch::Tensor freqs_sin,
                           torch::Tensor freqs_cos, const torch::Tensor& segment_ids, const KVCacheLayer* cache);
  torch::Tensor call_operator(const torch::Tensor& x, const torch::Tensor& freqs_sin, const torch::Tensor& freqs_cos,
                              const torch::Tensor& segment_ids, const KVCacheLayer* cache);
  torch::Tensor compose(const torch::Tensor& x, const torch::Tensor& freqs_sin, const torch::Tensor& freqs_cos,
                        const torch::Tensor& segment_ids, const KVCacheLayer* cache);

  std::map<std::string, torch::nn::AnyModule> replaced_;
};
TORCH_MODULE(SelfAttention);

}  // namespace selfattn
