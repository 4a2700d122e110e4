// Shapes and dtypes of the kernel operators' results, for tracing. Every result is contiguous.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention/kernel_ops.h"

namespace selfattn {
namespace {

std::tuple<at::Tensor, at::Tensor> flash_attention_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                        const OptionalTensor& segment_ids, bool causal,
                                                        std::optional<double> qk_scale,
                                                        const OptionalTensor& kv_segment_ids, int64_t window_left,
                                                        int64_t window_right, double softcap,
                                                        const OptionalTensor& sinks) {
  const AttentionProblem problem = make_flash_problem(
      q, k, v, {segment_ids, causal, qk_scale, kv_segment_ids, window_left, window_right, softcap, sinks});
  return {at::empty_symint({problem.batch(), problem.query_length(), problem.query_heads(), problem.value_head_dim()},
                           q.options()),
          at::empty_symint({problem.batch(), problem.query_heads(), problem.query_length()},
                           q.options().dtype(at::kFloat))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_attention_backward_meta(
    const at::Tensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse, const OptionalTensor& segment_ids, bool causal,
    std::optional<double> qk_scale, const OptionalTensor& kv_segment_ids, int64_t window_left, int64_t window_right,
    double softcap) {
  const AttentionProblem problem = make_flash_problem(
      q, k, v, {segment_ids, causal, qk_scale, kv_segment_ids, window_left, window_right, softcap, std::nullopt});
  check_gradients(problem, {grad_out, grad_lse, out, lse});
  const auto empty_like = [](const at::Tensor& tensor) {
    return at::empty_symint(tensor.sym_sizes(), tensor.options());
  };
  return {empty_like(q), empty_like(k), empty_like(v)};
}

void flash_attention_backward_into_meta(const at::Tensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& q,
                                        const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
                                        const at::Tensor& lse, const OptionalTensor& segment_ids, bool causal,
                                        std::optional<double> qk_scale, const OptionalTensor& kv_segment_ids,
                                        int64_t window_left, int64_t window_right, double softcap, at::Tensor& dq,
                                        at::Tensor& dk, at::Tensor& dv) {
  const AttentionProblem problem = make_flash_problem(
      q, k, v, {segment_ids, causal, qk_scale, kv_segment_ids, window_left, window_right, softcap, std::nullopt});
  const AttentionGradients gradients{grad_out, grad_lse, out, lse};
  check_gradients(problem, gradients);
  check_gradient_memory(problem, gradients, dq, dk, dv);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, Meta, m) {
  m.impl("flash_attention", TORCH_FN(selfattn::flash_attention_meta));
  m.impl("flash_attention_backward", TORCH_FN(selfattn::flash_attention_backward_meta));
  m.impl("flash_attention_backward.into", TORCH_FN(selfattn::flash_attention_backward_into_meta));
}
