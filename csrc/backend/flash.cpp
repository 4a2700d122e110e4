// This project's own kernels: the constraints that they put on a call.
#include <c10/util/StringUtil.h>

#include "attention/flash_attention_op.h"
#include "attention/select_backend.h"
#include "common/device.h"

namespace selfattn {
namespace {

using Reason = std::optional<std::string>;

constexpr int kHopper = 90;
constexpr int64_t kMaxHeadDimCpu = 512;
constexpr int64_t kMaxSegmentRow = 524288;  // what the metadata kernel holds in shared memory
constexpr int64_t kMaxRow = 1 << 29;        // positions and windows are counted in 32 bits
constexpr int64_t kMaxHeadDimCuda = 256;
constexpr int64_t kAlignment = 8;  // elements of 2 bytes: the 16 bytes that the tensor memory accelerator asks for

Reason has_kernel(const AttentionProblem& problem) {
  static const auto op = find_op<decltype(flash_attention_from_schema<nullptr>)>("selfattn::flash_attention");
  const at::Tensor& query = problem.query;
  const auto key = query.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  if (!query.is_cuda() && !query.is_cpu() && !query.is_meta()) {
    return c10::str("q must be on a CPU or CUDA device; got ", query.device());
  }
  if (query.is_meta() || op.hasKernelForDispatchKey(key)) return std::nullopt;
  return c10::str("this build of selfattn has no kernels for ", query.device());
}

Reason hopper(const AttentionProblem& problem) {
  if (!problem.query.is_cuda()) return std::nullopt;
  const auto capability = compute_capability(problem.query.device());
  if (!capability || *capability == kHopper) return std::nullopt;  // without CUDA, has_kernel says it
  return c10::str("it needs compute capability 9.0 (Hopper); got ", *capability / 10.0);
}

Reason supported_dtype(const AttentionProblem& problem) {
  const auto dtype = problem.query.scalar_type();
  if (dtype == at::kBFloat16 || dtype == at::kHalf || (dtype == at::kFloat && !problem.query.is_cuda())) {
    return std::nullopt;
  }
  return c10::str("q must be bfloat16 or float16", problem.query.is_cuda() ? "" : " or float32", "; got ", dtype);
}

Reason supported_head_dim(const AttentionProblem& problem) {
  const c10::SymInt dim = problem.head_dim(), value_dim = problem.value_head_dim();
  if (!problem.query.is_cuda()) {
    if (dim <= kMaxHeadDimCpu && value_dim <= kMaxHeadDimCpu) return std::nullopt;
    return c10::str("head dimensions must be at most ", kMaxHeadDimCpu, "; got ", dim, " and ", value_dim);
  }
  const auto suits = [](const c10::SymInt& d) { return d % kAlignment == 0 && d <= kMaxHeadDimCuda; };
  if (suits(dim) && suits(value_dim)) return std::nullopt;
  return c10::str("head dimensions must be multiples of ", kAlignment, " up to ", kMaxHeadDimCuda, "; got ", dim,
                  " and ", value_dim);
}

Reason scaled_products_on_cuda(const AttentionProblem& problem) {
  return problem.query.is_cuda() ? scaled_products(problem) : std::nullopt;
}

Reason rows_fit_kernels(const AttentionProblem& problem) {
  if (!problem.query.is_cuda()) return std::nullopt;
  if (problem.query_length() <= kMaxRow && problem.key_length() <= kMaxRow) return std::nullopt;
  return c10::str("rows must hold at most ", kMaxRow, " tokens on CUDA; got ", problem.query_length(), " and ",
                  problem.key_length());
}

Reason rows_fit_metadata(const AttentionProblem& problem) {
  if (!problem.query.is_cuda() || !problem.has_segments()) return std::nullopt;
  if (problem.query_length() <= kMaxSegmentRow && problem.key_length() <= kMaxSegmentRow) return std::nullopt;
  return c10::str("rows with segment ids must hold at most ", kMaxSegmentRow, " tokens on CUDA; got ",
                  problem.query_length(), " and ", problem.key_length());
}

constexpr Constraint kConstraints[] = {has_kernel,
                                       hopper,
                                       supported_dtype,
                                       supported_head_dim,
                                       scaled_products_on_cuda,
                                       rows_fit_kernels,
                                       rows_fit_metadata,
                                       no_empty_tensor,
                                       no_differentiation_transform,
                                       no_forward_mode_ad};

AttentionResults call(const AttentionProblem& problem) { return flash_attention(problem); }

}  // namespace

const AttentionBackend& flash_backend() {
  static const AttentionBackend backend{Backend::kFlash, kConstraints, call};
  return backend;
}

}  // namespace selfattn
