// ATen's cuDNN scaled-dot-product attention: dense attention on Ampere and newer GPUs.
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <c10/util/StringUtil.h>

#include "attention/select_backend.h"
#include "backend/kernel_inputs.h"
#include "common/device.h"
#include "common/kernel_limits.h"
#include "kv_cache/attention_op.h"

namespace selfattn {
namespace {

constexpr int kAmpere = 80;
constexpr int kHopper = 90;
constexpr int64_t kMaxHeadDim = 128;
constexpr int64_t kMaxHeadDimHopper = 256;
constexpr long kMinVersionHopper256 = 91000;  // ATen asks for cuDNN 9.10 beyond a head dimension of 128

Reason on_cuda(const AttentionProblem& problem) {
  if (problem.query.is_cuda()) return std::nullopt;
  return c10::str("q must be on a CUDA device; got ", problem.query.device());
}

Reason has_cudnn(const AttentionProblem& problem) {
  if (!problem.query.is_cuda()) return std::nullopt;  // on_cuda says it
  if (!at::detail::getCUDAHooks().compiledWithCuDNN()) return "this PyTorch was built without cuDNN";
  const auto capability = compute_capability(problem.query.device());
  if (!capability) {
    return c10::str("this build of selfattn has no CUDA part, or there is no device ", problem.query.device());
  }
  if (*capability < kAmpere) {
    return c10::str("it needs compute capability 8.0 or newer; got ", capability_to_string(*capability));
  }
  return std::nullopt;
}

Reason half_precision(const AttentionProblem& problem) {
  const auto dtype = problem.query.scalar_type();
  if (dtype == at::kBFloat16 || dtype == at::kHalf) return std::nullopt;
  return c10::str("q must be bfloat16 or float16; got ", dtype);
}

Reason supported_head_dim(const AttentionProblem& problem) {
  if (!problem.query.is_cuda()) return std::nullopt;
  const bool is_hopper = compute_capability(problem.query.device()) == kHopper &&
                         at::detail::getCUDAHooks().versionRuntimeCuDNN() >= kMinVersionHopper256;
  const int64_t limit = is_hopper ? kMaxHeadDimHopper : kMaxHeadDim;
  const auto suits = [&](const c10::SymInt& dim) { return dim % 8 == 0 && dim <= limit; };
  if (suits(problem.head_dim()) && suits(problem.value_head_dim())) return std::nullopt;
  return c10::str("head dimensions must be multiples of 8 up to ", limit, "; got ", problem.head_dim(), " and ",
                  problem.value_head_dim());
}

Reason dense_pairs(const AttentionProblem& problem) {
  if (!problem.has_segments() && !problem.has_window()) return std::nullopt;
  return "segment ids and windows are not supported";
}

Reason square_if_causal(const AttentionProblem& problem) {
  if (!problem.is_causal || problem.query_length() == problem.key_length()) return std::nullopt;
  return c10::str("causal attention needs equal lengths of q and k; got ", problem.query_length(), " and ",
                  problem.key_length());
}

Reason more_than_one_token(const AttentionProblem& problem) {
  if (problem.query_length() > 1 && problem.key_length() > 1) return std::nullopt;
  return "q and k must hold more than one token";
}

Reason not_deterministic(const AttentionProblem& problem) {
  if (!at::globalContext().deterministicAlgorithms() || !problem.requires_grad()) return std::nullopt;
  return "its backward is not deterministic, and torch.use_deterministic_algorithms is on";
}

Reason reads_no_cache(const KvCacheProblem&) { return "it does not read a KV cache"; }

constexpr Constraint kConstraints[] = {
    on_cuda,          has_cudnn,       half_precision,      supported_head_dim,    dense_pairs,
    square_if_causal, no_empty_tensor, more_than_one_token, scaled_products,       no_sinks,
    no_positions,     no_lse_output,   not_deterministic,   no_function_transform, no_forward_mode_ad};

std::tuple<at::Tensor, at::Tensor> call(const AttentionProblem& original) {
  const AttentionProblem problem = adapted_to_pytorch_kernels(original);
  const auto results = at::_scaled_dot_product_cudnn_attention(
      problem.query.transpose(1, 2), problem.key.transpose(1, 2), problem.value.transpose(1, 2),
      /*attn_bias=*/std::nullopt, /*compute_log_sumexp=*/problem.requires_grad(), /*dropout_p=*/0.0, problem.is_causal,
      /*return_debug_mask=*/false, problem.scale);
  return {std::get<0>(results).transpose(1, 2), at::Tensor()};
}

}  // namespace

const AttentionBackend& cudnn_backend() {
  static const AttentionBackend backend{Backend::kCudnn, kConstraints, call};
  return backend;
}

const KvCacheBackend& cudnn_kv_cache_backend() {
  static constexpr ConstraintOn<KvCacheProblem> kNone[] = {reads_no_cache};
  static const KvCacheBackend backend{Backend::kCudnn, kNone, /*call=*/nullptr};
  return backend;
}

}  // namespace selfattn
