// at::scaled_dot_product_attention, with a mask only where one is needed: dense causal and full attention reach ATen's
// own fast kernels.
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "attention/mask.h"
#include "attention/select_backend.h"
#include "backend/kernel_inputs.h"
#include "common/device.h"
#include "kv_cache/attention_op.h"
#include "kv_cache/gather.h"

namespace selfattn {
namespace {

constexpr Constraint kConstraints[] = {no_function_transform, no_forward_mode_ad, scaled_products, no_sinks,
                                       no_lse_output,         no_empty_tensor};

Reason no_fixed_splits(const KvCacheProblem& problem) {
  if (problem.split_keys == 0) return std::nullopt;
  return c10::str("split_keys must be 0; got ", problem.split_keys);
}

constexpr ConstraintOn<KvCacheProblem> kKvCacheConstraints[] = {
    no_function_transform, no_forward_mode_ad, scaled_products, no_sinks,
    no_lse_output,         no_empty_tensor,    no_fixed_splits};

/// 0 where a pair is allowed, -inf elsewhere, in q's dtype.
at::Tensor bias_of(const AttentionProblem& problem, const at::Tensor& allowed) {
  return at::zeros_symint(allowed.sym_sizes(), problem.query.options().requires_grad(false))
      .masked_fill(allowed.logical_not(), -std::numeric_limits<double>::infinity());
}

/// The memory-efficient kernel reads a bias whose rows start at multiples of 16 bytes, in q's dtype.
at::Tensor aligned_bias(const AttentionProblem& problem, const at::Tensor& allowed) {
  constexpr int64_t kAlignment = 8;
  const c10::SymInt keys = problem.key_length();
  const c10::SymInt padding = (kAlignment - keys % kAlignment) % kAlignment;
  return at::constant_pad_nd_symint(bias_of(problem, allowed), {c10::SymInt(0), padding})
      .narrow_symint(-1, 0, keys)
      .expand_symint({problem.batch(), problem.query_heads(), problem.query_length(), keys});
}

/// Whether PyTorch's memory-efficient kernel takes a CUDA tensor's dtype and head dimensions. Its bfloat16 needs
/// compute capability 8.0.
bool suits_efficient_attention(const AttentionProblem& problem) {
  constexpr int kAmpere = 80;
  const auto dtype = problem.query.scalar_type();
  if (dtype == at::kDouble) return false;
  if (dtype == at::kBFloat16 && compute_capability(problem.query.device()).value_or(kAmpere) < kAmpere) return false;
  return problem.head_dim() % 8 == 0 && problem.value_head_dim() % 8 == 0;
}

/// Whether a CUDA kernel can be launched: heads and batch are the second and third dimension of the grid, in the
/// memory-efficient kernel and its gradient as in PyTorch's other kernels.
bool fits_launch_grid(const AttentionProblem& problem) {
  constexpr int64_t kMaxBlocks = 65535;
  return problem.query_heads() <= kMaxBlocks && problem.batch() <= kMaxBlocks;
}

/// scaled_dot_product_attention of (B, N, S, D) tensors, under a mask or under causality.
at::Tensor plain_attention(const AttentionProblem& problem, const std::optional<at::Tensor>& allowed, bool is_causal) {
  const at::Tensor query = problem.query.transpose(1, 2);
  const at::Tensor key = problem.key.transpose(1, 2);
  const at::Tensor value = problem.value.transpose(1, 2);
  if (query.is_cuda() && !fits_launch_grid(problem)) {  // it would choose a kernel all the same
    // That one adds its mask, where scaled_dot_product_attention turns a boolean one into a bias first.
    const auto bias = allowed ? std::optional(bias_of(problem, *allowed)) : std::nullopt;
    return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, bias, 0.0, is_causal,
                                                              /*dropout_mask=*/std::nullopt, problem.scale,
                                                              /*enable_gqa=*/true));
  }
  return at::scaled_dot_product_attention(query, key, value, allowed, 0.0, is_causal, problem.scale,
                                          /*enable_gqa=*/true);
}

/// Attention under a mask with at least one allowed pair a row. On CUDA the kernel is named where cuDNN could serve,
/// since the choice inside scaled_dot_product_attention may fall on it, and its gradients under a dense mask can be
/// NaN.
at::Tensor masked_attention(const AttentionProblem& problem, const at::Tensor& allowed) {
  if (!problem.query.is_cuda() || !suits_efficient_attention(problem) || !fits_launch_grid(problem)) {
    return plain_attention(problem, allowed, /*is_causal=*/false);
  }
  at::Tensor key = problem.key.transpose(1, 2), value = problem.value.transpose(1, 2);
  if (problem.query_heads() != problem.key_heads()) {
    const c10::SymInt group = problem.query_heads() / problem.key_heads();
    key = at::repeat_interleave_symint(key, group, 1);
    value = at::repeat_interleave_symint(value, group, 1);
  }
  return std::get<0>(at::_scaled_dot_product_efficient_attention(
      problem.query.transpose(1, 2), key, value, aligned_bias(problem, allowed), problem.requires_grad(), 0.0,
      /*is_causal=*/false, problem.scale));
}

/// Attention under any mask: a row without an allowed pair attends to every key and is cleared afterwards. Kernels
/// differ on what they make of such a row, and a cleared output sends back a zero gradient.
AttentionResults attend_allowed(const AttentionProblem& problem, const at::Tensor& allowed) {
  const at::Tensor is_empty = allowed.any(-1, /*keepdim=*/true).logical_not();
  const at::Tensor out = masked_attention(problem, allowed.logical_or(is_empty));
  return {out.masked_fill(is_empty, 0.0).transpose(1, 2), at::Tensor()};
}

AttentionResults call(const AttentionProblem& original) {
  const AttentionProblem problem = adapted_to_pytorch_kernels(original);
  const bool is_plain_causal = problem.is_causal && !problem.has_segments() && !problem.has_window() &&
                               !problem.has_positions() && problem.query_length() == problem.key_length();
  const auto mask = is_plain_causal ? std::nullopt : attention_mask(problem);
  if (!mask) return {plain_attention(problem, std::nullopt, is_plain_causal).transpose(1, 2), at::Tensor()};
  return attend_allowed(problem, *mask);
}

AttentionResults attend_gathered(const KvCacheProblem& problem) {
  const GatheredProblem gathered = gather(problem);
  return scatter_results(problem, attend_allowed(adapted_to_pytorch_kernels(gathered.attention), gathered.allowed));
}

}  // namespace

const AttentionBackend& aten_backend() {
  static const AttentionBackend backend{Backend::kAten, kConstraints, call};
  return backend;
}

const KvCacheBackend& aten_kv_cache_backend() {
  static const KvCacheBackend backend{Backend::kAten, kKvCacheConstraints, attend_gathered};
  return backend;
}

}  // namespace selfattn
