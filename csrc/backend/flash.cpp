// This project's own kernels: the constraints that they put on a call.
#include <c10/util/StringUtil.h>

#include "attention/flash_attention_op.h"
#include "attention/select_backend.h"
#include "common/device.h"
#include "common/kernel_limits.h"

namespace selfattn {
namespace {

constexpr int64_t kMaxHeadDimCpu = 512;

bool is_float32(const AttentionProblem& problem) { return problem.query.scalar_type() == at::kFloat; }

// The kernels of a CUDA tensor's device and compute capability for the call.
FlashSupport find_support(const AttentionProblem& problem, int capability) {
  const bool is_aligned = are_rows_aligned(problem.head_dim(), problem.value_head_dim(), problem.query.element_size());
  return find_flash_support(problem.query.device().index(), capability, is_float32(problem), is_aligned);
}

// What they take; null elsewhere, and where there are none.
const KernelLimits* cuda_limits(const AttentionProblem& problem) {
  if (!problem.query.is_cuda()) return nullptr;
  const auto capability = compute_capability(problem.query.device());
  return capability ? find_support(problem, *capability).limits : nullptr;
}

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

Reason supported_device(const AttentionProblem& problem) {
  if (!problem.query.is_cuda()) return std::nullopt;
  forced_flash_family();                         // an error where the environment names none
  if (has_kernel(problem)) return std::nullopt;  // a build without CUDA, of which that is said
  const c10::Device device = problem.query.device();
  const auto capability = compute_capability(device);
  if (!capability) return c10::str("it needs compute capability 8.0 or newer; there is no device ", device);
  FlashSupport support = find_support(problem, *capability);
  if (support.limits) return std::nullopt;
  return std::move(support.reason);
}

Reason supported_dtype(const AttentionProblem& problem) {
  const auto dtype = problem.query.scalar_type();
  if (dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat) return std::nullopt;
  return c10::str("q must be bfloat16 or float16 or float32; got ", dtype);
}

Reason supported_head_dim(const AttentionProblem& problem) {
  const c10::SymInt dim = problem.head_dim(), value_dim = problem.value_head_dim();
  const KernelLimits* limits = cuda_limits(problem);
  if (problem.query.is_cuda() && !limits) return std::nullopt;
  const int64_t most = limits ? limits->max_head_dim : kMaxHeadDimCpu;
  if (dim <= most && value_dim <= most) return std::nullopt;
  return c10::str("head dimensions must be at most ", most, "; got ", dim, " and ", value_dim);
}

Reason rows_fit_kernels(const AttentionProblem& problem) {
  const KernelLimits* limits = cuda_limits(problem);
  if (!limits) return std::nullopt;
  if (problem.query_length() <= limits->max_length && problem.key_length() <= limits->max_length) return std::nullopt;
  return c10::str("rows must hold at most ", limits->max_length, " tokens on CUDA; got ", problem.query_length(),
                  " and ", problem.key_length());
}

Reason rows_fit_metadata(const AttentionProblem& problem) {
  const KernelLimits* limits = cuda_limits(problem);
  if (!limits || !(problem.has_segments() || problem.has_positions())) return std::nullopt;
  const int64_t most = limits->max_packed_length;
  if (problem.query_length() <= most && problem.key_length() <= most) return std::nullopt;
  return c10::str("rows with segment ids or positions must hold at most ", most, " tokens on CUDA; got ",
                  problem.query_length(), " and ", problem.key_length());
}

constexpr Constraint kConstraints[] = {
    has_kernel,        supported_device,  supported_dtype, supported_head_dim,
    rows_fit_kernels,  rows_fit_metadata, no_empty_tensor, no_differentiation_transform,
    no_forward_mode_ad};

}  // namespace

const AttentionBackend& flash_backend() {
  static const AttentionBackend backend{Backend::kFlash, kConstraints, flash_attention};
  return backend;
}

}  // namespace selfattn
