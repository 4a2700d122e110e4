// selfattn::flash_attention_backward on CUDA: tensors -> params -> launch.
#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "attention/flash_attention_op.h"
#include "binding.h"
#include "ordered_call.h"

namespace selfattn::cuda {
namespace {

using at::Tensor;

// The tables of the segments, with the order of key tiles that this pass wants, and their memory.
Tensor prepare_segments(const FlashKernels& kernels, const AttentionProblem& problem, BackwardParams& params,
                        cudaStream_t stream) {
  SegmentProblem segments = segment_problem(problem, kernels.backward_tiles(params), SegmentSide::kKeys);
  segments.ordered_queries = kernels.backward_ordered_queries(params);
  const Tensor storage = empty({segment_tables_bytes(segments)}, at::kByte, problem.query.device());
  params.segments = make_segment_tables(segments, storage.mutable_data_ptr());
  C10_CUDA_CHECK(launch_prepare_segments(segments, params.segments, stream));
  return storage;
}

// No element of out is read once its place in dq is written, none of k once that in dk is, none of v once that in dv
// is: a thread block that stores a tile of a gradient has read that tile of the other before, and no other block reads
// it in this kernel or in a later one (docs/kernels/backward.md). `problem` with positions: of tokens in order.
void attend_rows_backward_into(const AttentionProblem& problem, const AttentionGradients& gradients, const Tensor& dq,
                               const Tensor& dk, const Tensor& dv) {
  const Tensor &q = problem.query, &k = problem.key, &v = problem.value;
  const auto& [grad_out, grad_lse, out, lse] = gradients;
  const c10::cuda::CUDAGuard guard(q.device());
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const AttentionShape shape = shape_of(q, k, v);
  const RowLayout layout = row_layout(shape, static_cast<int>(q.element_size()));
  const FlashKernels& kernels = flash_kernels(element_of(q), layout);
  const ScaledQuery scaled = with_positive_scale(q, problem.scale);
  const Tensor query = with_kernel_layout(scaled.query, layout), key = with_kernel_layout(k, layout),
               value = with_kernel_layout(v, layout);
  const Tensor out_rows = with_kernel_layout(out, layout), grad_out_rows = with_kernel_layout(grad_out, layout);
  const Tensor lse_rows = lse.contiguous(), grad_lse_rows = grad_lse ? grad_lse->contiguous() : Tensor();
  const auto memory_of = [&](const Tensor& result) { return ResultMemory(result, has_kernel_layout(result, layout)); };
  const ResultMemory grad_q = memory_of(dq), grad_k = memory_of(dk), grad_v = memory_of(dv);

  BackwardParams params{};
  params.shape = shape;
  params.window = window_of(problem);
  params.element = element_of(q);
  params.allows_tf32 = params.element == ElementType::kFloat && allows_tf32();
  params.scale = scaled.scale;
  params.softcap = static_cast<float>(problem.softcap);
  params.sms_left_free = sms_left_free();
  params.is_deterministic = at::globalContext().deterministicAlgorithms();
  params.q = view_of(query), params.k = view_of(key), params.v = view_of(value);
  params.out = view_of(out_rows), params.grad_out = view_of(grad_out_rows);
  params.grad_q = view_of(grad_q.rows());
  params.grad_k = view_of(grad_k.rows()), params.grad_v = view_of(grad_v.rows());
  params.lse = lse_rows.const_data_ptr<float>();
  params.grad_lse = grad_lse ? grad_lse_rows.const_data_ptr<float>() : nullptr;
  const Tensor segment_storage = problem.has_segments() ? prepare_segments(kernels, problem, params, stream) : Tensor();
  const Tensor workspace = empty({kernels.backward_workspace_bytes(params)}, at::kByte, q.device());
  params.workspace = workspace.mutable_data_ptr();
  C10_CUDA_CHECK(kernels.launch_backward(params, stream));
  if (scaled.sign != 1) grad_q.rows().mul_(scaled.sign);
  for (const ResultMemory* result : {&grad_q, &grad_k, &grad_v}) result->hand_over();
}

InputGradients attend_backward(const AttentionProblem& problem, const AttentionGradients& gradients);

void attend_backward_into(const AttentionProblem& problem, const AttentionGradients& gradients, const Tensor& dq,
                          const Tensor& dk, const Tensor& dv) {
  if (!problem.has_positions()) {
    attend_rows_backward_into(problem, gradients, dq, dk, dv);
    return;
  }
  const OrderedCall call(problem);
  if (!call.is_copied()) {
    attend_rows_backward_into(call.problem(), gradients, dq, dk, dv);
    return;
  }
  call.as_called_into(dq, dk, dv, attend_backward(call.problem(), call.in_order(gradients)));
}

InputGradients attend_backward(const AttentionProblem& problem, const AttentionGradients& gradients) {
  const Tensor dq = empty_like_contiguous(problem.query), dk = empty_like_contiguous(problem.key),
               dv = empty_like_contiguous(problem.value);
  attend_backward_into(problem, gradients, dq, dk, dv);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace selfattn::cuda

TORCH_LIBRARY_IMPL(selfattn, CUDA, m) {
  using namespace selfattn;
  m.impl("flash_attention_backward",
         TORCH_FN(FlashAttentionBackward::from_schema<checked<selfattn::cuda::attend_backward>>));
  m.impl("flash_attention_backward.into",
         TORCH_FN(FlashAttentionBackwardInto::from_schema<checked<selfattn::cuda::attend_backward_into>>));
}
