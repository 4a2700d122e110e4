// This project's own kernels: the constraints that they put on a call.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/util/StringUtil.h>

#include "attention/kernel_ops.h"
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

const c10::OperatorHandle& flash_attention_handle() {
  static const c10::OperatorHandle handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("selfattn::flash_attention", "");
  return handle;
}

Reason has_kernel(const AttentionProblem& problem) {
  const at::Tensor& query = problem.query;
  const auto key = query.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  if (!query.is_cuda() && !query.is_cpu() && !query.is_meta()) {
    return c10::str("q must be on a CPU or CUDA device; got ", query.device());
  }
  if (query.is_meta() || flash_attention_handle().hasKernelForDispatchKey(key)) return std::nullopt;
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

Reason no_softcap_on_cuda(const AttentionProblem& problem) {
  return problem.query.is_cuda() ? no_softcap(problem) : std::nullopt;
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
                                       no_softcap_on_cuda,
                                       rows_fit_kernels,
                                       rows_fit_metadata,
                                       no_empty_tensor,
                                       no_differentiation_transform,
                                       no_forward_mode_ad};

std::tuple<at::Tensor, at::Tensor> call(const AttentionProblem& problem) { return flash_attention(problem); }

}  // namespace

std::tuple<at::Tensor, at::Tensor> flash_attention(const AttentionProblem& problem) {
  using Schema = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, bool, std::optional<double>,
      const OptionalTensor&, int64_t, int64_t, double, const OptionalTensor&);
  static const auto op = flash_attention_handle().typed<Schema>();
  return op.call(problem.query, problem.key, problem.value, problem.query_segment_ids, problem.is_causal, problem.scale,
                 problem.key_segment_ids, problem.window_left, problem.window_right, problem.softcap, problem.sinks);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_attention_backward(const AttentionProblem& problem,
                                                                        const AttentionGradients& gradients) {
  using Schema = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
      const at::Tensor&, const at::Tensor&, const OptionalTensor&, bool, std::optional<double>, const OptionalTensor&,
      int64_t, int64_t, double);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("selfattn::flash_attention_backward", "").typed<Schema>();
  return op.call(gradients.grad_out, gradients.grad_lse, problem.query, problem.key, problem.value, gradients.out,
                 gradients.lse, problem.query_segment_ids, problem.is_causal, problem.scale, problem.key_segment_ids,
                 problem.window_left, problem.window_right, problem.softcap);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_attention_backward_into(const AttentionProblem& problem,
                                                                             const AttentionGradients& gradients,
                                                                             const GradientMemory& memory) {
  using Schema = void(const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                      const at::Tensor&, const at::Tensor&, const OptionalTensor&, bool, std::optional<double>,
                      const OptionalTensor&, int64_t, int64_t, double, at::Tensor&, at::Tensor&, at::Tensor&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("selfattn::flash_attention_backward", "into").typed<Schema>();
  const auto take = [](const OptionalTensor& memory, const at::Tensor& like) {
    return memory ? *memory : at::empty(like.sizes(), like.options());
  };
  at::Tensor dq = take(memory.query, problem.query), dk = take(memory.key, problem.key),
             dv = take(memory.value, problem.value);
  op.call(gradients.grad_out, gradients.grad_lse, problem.query, problem.key, problem.value, gradients.out,
          gradients.lse, problem.query_segment_ids, problem.is_causal, problem.scale, problem.key_segment_ids,
          problem.window_left, problem.window_right, problem.softcap, dq, dk, dv);
  return {dq, dk, dv};
}

AttentionProblem make_flash_problem(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                    const AttentionArguments& arguments) {
  AttentionProblem problem = make_attention_problem(q, k, v, arguments, /*needs_lse=*/true);
  const auto reasons = reasons_against(flash_backend(), problem);
  TORCH_CHECK_NOT_IMPLEMENTED(reasons.empty(),
                              "selfattn: flash_attention cannot serve this call: ", c10::Join("; ", reasons));
  return problem;
}

const AttentionBackend& flash_backend() {
  static const AttentionBackend backend{Backend::kFlash, kConstraints, call};
  return backend;
}

}  // namespace selfattn
