// selfattn::flash_attention_backward on CUDA: tensors -> params -> launch.
#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "attention/kernel_ops.h"
#include "flash/backward.h"

namespace selfattn::cuda {
namespace {

using at::Tensor;

// The kernels take 16-byte rows of any strides. Expanded tensors (gradients of sums) and odd views are copied.
bool has_kernel_layout(const Tensor& t) {
  constexpr int64_t kElementsOfChunk = 8;
  if (t.stride(3) != 1 || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) return false;
  for (int dim = 0; dim < 3; dim++) {
    if (t.size(dim) > 1 && (t.stride(dim) % kElementsOfChunk != 0 || t.stride(dim) <= 0)) return false;
  }
  return true;
}

Tensor with_kernel_layout(const Tensor& t) { return has_kernel_layout(t) ? t : t.clone(at::MemoryFormat::Contiguous); }

TensorView view_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// Contiguous and not filled, not even in the deterministic mode, which fills what at::empty makes: every element is
// written.
Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, at::Device device) {
  return Tensor(at::detail::empty_cuda(sizes, dtype, device, std::nullopt));
}

Tensor empty_like_contiguous(const Tensor& t) { return empty(t.sizes(), t.scalar_type(), t.device()); }

int window_side(int64_t size) {
  return size < 0 || size > AttentionWindow::kUnbounded ? AttentionWindow::kUnbounded : int(size);
}

// The tables of the segments, with the order of key tiles that this pass wants, and their memory.
Tensor prepare_segments(const AttentionProblem& problem, BackwardParams& params, cudaStream_t stream) {
  const Tensor &query_ids = *problem.query_segment_ids, &key_ids = *problem.key_segment_ids;
  const TileSizes tiles = flash_attention_backward_tiles(params.shape);
  const SegmentProblem segments = {.query_ids = query_ids.const_data_ptr(),
                                   .key_ids = key_ids.const_data_ptr(),
                                   .ids_are_int64 = query_ids.scalar_type() == at::kLong,
                                   .query_stride_batch = query_ids.stride(0),
                                   .query_stride_token = query_ids.stride(1),
                                   .key_stride_batch = key_ids.stride(0),
                                   .key_stride_token = key_ids.stride(1),
                                   .batch = params.shape.batch,
                                   .query_length = params.shape.query_length,
                                   .key_length = params.shape.key_length,
                                   .query_tile = tiles.query,
                                   .key_tile = tiles.key,
                                   .window_left = params.window.left,
                                   .window_right = params.window.right,
                                   .order_of = SegmentSide::kKeys};
  const Tensor storage = empty({segment_tables_bytes(segments)}, at::kByte, query_ids.device());
  params.segments = make_segment_tables(segments, storage.mutable_data_ptr());
  C10_CUDA_CHECK(launch_prepare_segments(segments, params.segments, stream));
  return storage;
}

void check_saved(const AttentionProblem& problem, const Tensor& grad_out, const OptionalTensor& grad_lse,
                 const Tensor& out, const Tensor& lse) {
  const Tensor& q = problem.query;
  const auto check = [&](const Tensor& tensor, const char* name, at::ScalarType dtype, at::IntArrayRef sizes) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype && tensor.device() == q.device(), "selfattn: ", name, " must be ",
                     dtype, " on ", q.device(), "; got ", tensor.scalar_type(), " on ", tensor.device());
    TORCH_CHECK_VALUE(tensor.sizes() == sizes, "selfattn: ", name, " must have the shape ", sizes, "; got ",
                      tensor.sizes());
  };
  const int64_t out_sizes[] = {q.size(0), q.size(1), q.size(2), problem.value.size(3)},
                row_sizes[] = {q.size(0), q.size(2), q.size(1)};
  check(grad_out, "grad_out", q.scalar_type(), out_sizes);
  check(out, "out", q.scalar_type(), out_sizes);
  check(lse, "lse", at::kFloat, row_sizes);
  if (grad_lse) check(*grad_lse, "grad_lse", at::kFloat, row_sizes);
}

std::tuple<Tensor, Tensor, Tensor> flash_attention_backward(const Tensor& grad_out, const OptionalTensor& grad_lse,
                                                            const Tensor& q, const Tensor& k, const Tensor& v,
                                                            const Tensor& out, const Tensor& lse,
                                                            const OptionalTensor& segment_ids, bool causal,
                                                            std::optional<double> qk_scale,
                                                            const OptionalTensor& kv_segment_ids, int64_t window_left,
                                                            int64_t window_right, double softcap) {
  const AttentionProblem problem = make_flash_problem(
      q, k, v, {segment_ids, causal, qk_scale, kv_segment_ids, window_left, window_right, softcap, std::nullopt});
  check_saved(problem, grad_out, grad_lse, out, lse);
  const c10::cuda::CUDAGuard guard(q.device());
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const Tensor query = with_kernel_layout(q), key = with_kernel_layout(k), value = with_kernel_layout(v);
  const Tensor out_rows = with_kernel_layout(out), grad_out_rows = with_kernel_layout(grad_out);
  const Tensor lse_rows = lse.contiguous(), grad_lse_rows = grad_lse ? grad_lse->contiguous() : Tensor();
  const Tensor dq = empty_like_contiguous(q), dk = empty_like_contiguous(k), dv = empty_like_contiguous(v);

  BackwardParams params{};
  params.shape = {.batch = static_cast<int>(q.size(0)),
                  .query_length = static_cast<int>(q.size(1)),
                  .key_length = static_cast<int>(k.size(1)),
                  .num_heads = static_cast<int>(q.size(2)),
                  .num_kv_heads = static_cast<int>(k.size(2)),
                  .dim_qk = static_cast<int>(q.size(3)),
                  .dim_v = static_cast<int>(v.size(3))};
  TORCH_INTERNAL_ASSERT(flash_attention_backward_supports(params.shape));
  params.window = {.left = window_side(problem.window_left),
                   .right = problem.is_causal ? 0 : window_side(problem.window_right)};
  params.element = q.scalar_type() == at::kBFloat16 ? ElementType::kBFloat16 : ElementType::kHalf;
  params.scale = static_cast<float>(problem.scale);
  params.is_deterministic = at::globalContext().deterministicAlgorithms();
  params.q = view_of(query), params.k = view_of(key), params.v = view_of(value);
  params.out = view_of(out_rows), params.grad_out = view_of(grad_out_rows);
  params.grad_q = view_of(dq), params.grad_k = view_of(dk), params.grad_v = view_of(dv);
  params.lse = lse_rows.const_data_ptr<float>();
  params.grad_lse = grad_lse ? grad_lse_rows.const_data_ptr<float>() : nullptr;
  const Tensor segment_storage = problem.has_segments() ? prepare_segments(problem, params, stream) : Tensor();
  const Tensor workspace = empty({flash_attention_backward_workspace_bytes(params)}, at::kByte, q.device());
  params.workspace = workspace.mutable_data_ptr();
  C10_CUDA_CHECK(launch_flash_attention_backward(params, stream));
  return {dq, dk, dv};
}

}  // namespace
}  // namespace selfattn::cuda

TORCH_LIBRARY_IMPL(selfattn, CUDA, m) {
  m.impl("flash_attention_backward", TORCH_FN(selfattn::cuda::flash_attention_backward));
}
