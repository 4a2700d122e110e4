// This project's own kernels over a KV cache: the constraints that they put on a call.
#include <c10/util/StringUtil.h>

#include "kv_cache/attention_op.h"

namespace selfattn {
namespace {

/// A kernel that a device registers is taken from then on; meta tensors stand for those of either device.
Reason has_kernel(const KvCacheProblem& problem) {
  static const auto op = find_op<decltype(flash_kv_cache_from_schema<nullptr>)>("selfattn::flash_attention_kv_cache");
  const at::Tensor& query = problem.query;
  if (!query.is_cuda() && !query.is_cpu() && !query.is_meta()) {
    return c10::str("q must be on a CPU or CUDA device; got ", query.device());
  }
  const bool serves_cpu = op.hasKernelForDispatchKey(c10::DispatchKey::CPU);
  const bool serves_cuda = op.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  if (query.is_cuda() ? serves_cuda : serves_cpu || (query.is_meta() && serves_cuda)) return std::nullopt;
  return c10::str("this build of selfattn has no kernels over a KV cache for ", query.device());
}

Reason supported_dtype(const KvCacheProblem& problem) {
  const auto dtype = problem.query.scalar_type();
  if (dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat) return std::nullopt;
  return c10::str("q must be bfloat16 or float16 or float32; got ", dtype);
}

Reason no_gradient(const KvCacheProblem& problem) {
  if (!problem.requires_grad()) return std::nullopt;
  return "its kernels over a KV cache are not differentiable, and an argument requires a gradient";
}

constexpr ConstraintOn<KvCacheProblem> kConstraints[] = {has_kernel,      supported_dtype,       no_gradient,
                                                         no_empty_tensor, no_function_transform, no_forward_mode_ad};

}  // namespace

const KvCacheBackend& flash_kv_cache_backend() {
  static const KvCacheBackend backend{Backend::kFlash, kConstraints, flash_attention_kv_cache};
  return backend;
}

}  // namespace selfattn
