// selfattn::qk_norm_rope and its gradient on CUDA: tensors -> params -> launch.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "binding.h"
#include "qk_norm_rope/params.h"
#include "rotary/norm_rope.h"

namespace selfattn::cuda {
namespace {

using at::Tensor;

constexpr int64_t kMaxTokens = int64_t{1} << 30;
constexpr uintptr_t kVectorBytes = 16;

std::optional<FloatType> float_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return FloatType::kFloat;
    case at::kBFloat16:
      return FloatType::kBFloat16;
    case at::kHalf:
      return FloatType::kHalf;
    default:
      return std::nullopt;
  }
}

bool has_kernel(const Tensor& x) {
  return float_type(x.scalar_type()) && x.size(3) > 0 && x.size(3) <= kMaxNormRopeDim && x.size(0) <= kMaxTokens &&
         x.size(1) <= kMaxTokens && x.size(0) * x.size(1) <= kMaxTokens && x.size(2) <= kMaxTokens;
}

bool have_kernels(const Tensor& q, const Tensor& k) {
  return has_kernel(q) && has_kernel(k) && q.device() == k.device() && qk_norm_rope_runs_on(q.device().index());
}

/// The tensor itself where the kernels can read it, else a contiguous copy.
Tensor readable(const Tensor& x) {
  bool is_readable = x.size(3) == 1 || x.stride(3) == 1;
  if (has_vector_kernel(x.size(3))) {
    const int64_t elements = static_cast<int64_t>(kVectorBytes) / x.element_size();
    is_readable = is_readable && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kVectorBytes == 0;
    for (int64_t dim = 0; dim < 3; dim++) {
      is_readable = is_readable && (x.size(dim) <= 1 || x.stride(dim) % elements == 0);
    }
  }
  return is_readable ? x : x.clone(at::MemoryFormat::Contiguous);
}

HeadsView view_of_heads(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

/// In one of the dtypes that the kernels read.
Tensor with_float_type(const Tensor& tensor) {
  return float_type(tensor.scalar_type()) ? tensor : tensor.to(at::kFloat);
}

/// The angles of heads, and the tensors that they point into.
struct Angles {
  Tensor sin, cos, positions;
  AngleSource source{};

  explicit Angles(const NormRopeCall& call) {
    const auto row_stride = [](const Tensor& tensor) { return tensor.size(0) == 1 ? 0 : tensor.stride(0); };
    if (call.freqs_sin) {
      sin = with_float_type(*call.freqs_sin), cos = with_float_type(*call.freqs_cos);
      if (sin.scalar_type() != cos.scalar_type()) sin = sin.to(at::kFloat), cos = cos.to(at::kFloat);
      if (sin.strides() != cos.strides() || sin.size(0) != cos.size(0)) {
        const int64_t rows = std::max(sin.size(0), cos.size(0));
        sin = sin.expand({rows, -1, -1}).contiguous(), cos = cos.expand({rows, -1, -1}).contiguous();
      }
      source.sin = sin.const_data_ptr(), source.cos = cos.const_data_ptr();
      source.table_type = *float_type(sin.scalar_type());
      source.table_stride_batch = row_stride(sin);
      source.table_stride_token = sin.stride(1), source.table_stride_pair = sin.stride(2);
    } else if (call.positions) {
      positions = *call.positions;
      const auto dtype = positions.scalar_type();
      if (dtype != at::kInt && dtype != at::kLong) positions = positions.to(at::kDouble);
      source.position_type = dtype == at::kInt    ? PositionType::kInt32
                             : dtype == at::kLong ? PositionType::kInt64
                                                  : PositionType::kDouble;
      source.positions = positions.const_data_ptr();
      source.position_stride_batch = row_stride(positions), source.position_stride_token = positions.stride(1);
    }
  }
};

/// Of heads like `x`, without sides.
NormRopeParams make_params(const NormRopeCall& call, const Tensor& x) {
  NormRopeParams params{};
  params.dim = static_cast<int>(x.size(3));
  params.element = *float_type(x.scalar_type());
  params.has_norm = call.norm, params.has_rope = call.rope;
  params.pairs_halves = call.pairing == RotaryPairing::kHalf;
  params.eps = static_cast<float>(call.eps), params.theta = call.theta;
  if (call.rope && !call.freqs_sin && has_vector_kernel(x.size(3))) {
    const std::vector<double>& angles = quarter_turns(x.size(3), call.theta);
    std::copy(angles.begin(), angles.end(), params.quarter_turns);
  }
  return params;
}

void set_shape(NormRopeSide& side, const Tensor& x, const Tensor& result, const Angles& angles) {
  side.batch = static_cast<int>(x.size(0)), side.length = static_cast<int>(x.size(1));
  side.heads = static_cast<int>(x.size(2));
  side.result = result.mutable_data_ptr();
  side.angles = angles.source;
}

void set_weight(NormRopeSide& side, const Tensor& weight) {
  if (!weight.defined()) return;
  side.weight = weight.const_data_ptr();
  side.weight_type = *float_type(weight.scalar_type());
}

Tensor readable_weight(const OptionalTensor& weight) {
  return weight ? with_float_type(*weight).contiguous() : Tensor();
}

/// run(params) for q and k together where one kernel serves both, else for one after the other.
template <typename Run>
void for_each_launch(const NormRopeCall& call, const Tensor& q, const Tensor& k, const NormRopeSide& q_side,
                     const NormRopeSide& k_side, const Run& run) {
  NormRopeParams params = make_params(call, q);
  params.sides[0] = q_side;
  params.num_sides = 1;
  if (q.size(3) == k.size(3) && q.scalar_type() == k.scalar_type()) {
    params.sides[params.num_sides++] = k_side;
    return run(params);
  }
  run(params);
  params = make_params(call, k);
  params.sides[0] = k_side;
  params.num_sides = 1;
  run(params);
}

/// The heads that a launch reads, and those that it writes, contiguous: others, or the same.
struct Heads {
  const Tensor& q;
  const Tensor& k;
};

/// `rotates_back`: the transposed rotation, which is the gradient of a call without norm.
void launch_forward(const NormRopeCall& call, const Heads& from, const Heads& to, bool rotates_back) {
  const Tensor &q = from.q, &k = from.k;
  const c10::cuda::CUDAGuard guard(q.device());
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const Angles angles(call);
  const Tensor inputs[] = {readable(q), readable(k)};
  const Tensor weights[] = {readable_weight(call.q_weight), readable_weight(call.k_weight)};
  NormRopeSide sides[2] = {};
  for (int i = 0; i < 2; i++) {
    set_shape(sides[i], inputs[i], i == 0 ? to.q : to.k, angles);
    set_weight(sides[i], weights[i]);
    sides[i].input = view_of_heads(inputs[i]);
  }
  for_each_launch(call, q, k, sides[0], sides[1], [&](NormRopeParams& params) {
    params.rotates_back = rotates_back;
    C10_CUDA_CHECK(schedule_qk_norm_rope(params, /*is_backward=*/false));
    C10_CUDA_CHECK(launch_qk_norm_rope_forward(params, stream));
  });
}

NormRopeHeads qk_norm_rope_cuda(const NormRopeCall& call) {
  if (!have_kernels(call.q, call.k)) return compose_norm_rope(call);
  const Tensor q = empty_like_contiguous(call.q), k = empty_like_contiguous(call.k);
  launch_forward(call, {call.q, call.k}, {q, k}, /*rotates_back=*/false);
  return {q, k};
}

/// `to` may be `grads` themselves: a lane has read what it writes over, and no other lane reads it.
NormRopeWeightGradients launch_backward(const NormRopeCall& call, const Heads& from, const Heads& to) {
  const Tensor &grad_q = from.q, &grad_k = from.k;
  const auto no_gradient = [](const Tensor& grad) { return empty({0}, grad.scalar_type(), grad.device()); };
  if (!call.norm) {
    launch_forward(call, from, to, /*rotates_back=*/true);
    return {no_gradient(grad_q), no_gradient(grad_k)};
  }
  const c10::cuda::CUDAGuard guard(grad_q.device());
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const Angles angles(call);
  const OptionalTensor* const given_weights[] = {&call.q_weight, &call.k_weight};
  const Tensor inputs[] = {readable(call.q), readable(call.k)}, grads[] = {readable(grad_q), readable(grad_k)};
  const Tensor weights[] = {readable_weight(call.q_weight), readable_weight(call.k_weight)};
  Tensor weight_gradients[2];
  NormRopeSide sides[2] = {};
  for (int i = 0; i < 2; i++) {
    set_shape(sides[i], grads[i], i == 0 ? to.q : to.k, angles);
    set_weight(sides[i], weights[i]);
    sides[i].input = view_of_heads(inputs[i]);
    sides[i].grad = view_of_heads(grads[i]);
    weight_gradients[i] = weights[i].defined() ? empty_like_contiguous(weights[i]) : no_gradient(grads[i]);
    if (weights[i].defined()) sides[i].weight_gradient = weight_gradients[i].mutable_data_ptr();
  }
  for_each_launch(call, grad_q, grad_k, sides[0], sides[1], [&](NormRopeParams& params) {
    C10_CUDA_CHECK(schedule_qk_norm_rope(params, /*is_backward=*/true));
    int64_t rows = 0;
    for (int i = 0; i < params.num_sides; i++) rows += params.sides[i].weight ? params.sides[i].blocks : 0;
    const Tensor sums = empty({rows, params.dim}, at::kFloat, grad_q.device());
    float* row = sums.mutable_data_ptr<float>();
    for (int i = 0; i < params.num_sides; i++) {
      NormRopeSide& side = params.sides[i];
      if (!side.weight) continue;
      side.partial_sums = row;
      row += static_cast<int64_t>(side.blocks) * params.dim;
    }
    C10_CUDA_CHECK(launch_qk_norm_rope_backward(params, stream));
  });
  for (int i = 0; i < 2; i++) {
    if (*given_weights[i]) weight_gradients[i] = weight_gradients[i].to((*given_weights[i])->scalar_type());
  }
  return {weight_gradients[0], weight_gradients[1]};
}

NormRopeGradients qk_norm_rope_backward_cuda(const NormRopeCall& call, const Tensor& grad_q, const Tensor& grad_k) {
  if (!have_kernels(grad_q, grad_k)) return compose_norm_rope_backward(call, grad_q, grad_k);
  const Tensor dq = empty_like_contiguous(grad_q), dk = empty_like_contiguous(grad_k);
  const auto [dq_weight, dk_weight] = launch_backward(call, {grad_q, grad_k}, {dq, dk});
  return {dq, dk, dq_weight, dk_weight};
}

NormRopeWeightGradients qk_norm_rope_backward_in_place_cuda(const NormRopeCall& call, Tensor& grad_q, Tensor& grad_k) {
  if (!have_kernels(grad_q, grad_k)) return copy_norm_rope_backward(call, grad_q, grad_k);
  return launch_backward(call, {grad_q, grad_k}, {grad_q, grad_k});
}

}  // namespace
}  // namespace selfattn::cuda

TORCH_LIBRARY_IMPL(selfattn, CUDA, m) {
  using namespace selfattn::cuda;
  selfattn::register_norm_rope<qk_norm_rope_cuda, qk_norm_rope_backward_cuda, qk_norm_rope_backward_in_place_cuda>(m);
}
