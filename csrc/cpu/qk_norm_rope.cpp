// qk_norm_rope and its gradient on CPU: tensors -> problems -> ranges of tokens on threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cpu/qk_norm_rope_kernels.h"
#include "cpu/select_kernels.h"
#include "cpu/token_view.h"
#include "rotary/norm_rope.h"

namespace selfattn {
namespace {

using namespace cpu;

constexpr int64_t kMostRanges = 1024;  // each has its own sum of the weight's gradient

bool has_kernel(const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

at::Tensor contiguous_like(const at::Tensor& tensor) { return at::empty(tensor.sizes(), tensor.options()); }

/// One of q and k, with the tensors that its problem points into.
struct Side {
  at::Tensor input, grad, result, weight, sin, cos, positions;
  std::vector<double> quarter_turns;
  NormRopeProblem problem;
  int64_t range = 1, ranges = 0;  // tokens of a range, and their number
  const NormRopeKernels* kernels = nullptr;
};

/// `result` is contiguous, of the shape and dtype of the heads. `input` and `grad` are undefined where they are not
/// read.
Side make_side(const NormRopeCall& call, const at::Tensor& input, const at::Tensor& grad, const OptionalTensor& weight,
               const at::Tensor& result) {
  Side side;
  NormRopeProblem& p = side.problem;
  p.batch = result.size(0), p.length = result.size(1), p.heads = result.size(2), p.dim = result.size(3);
  side.result = result;
  p.result = side.result.mutable_data_ptr();
  if (input.defined()) side.input = with_contiguous_rows(input), p.input = view_of(side.input);
  if (grad.defined()) side.grad = with_contiguous_rows(grad), p.grad = view_of(side.grad);
  p.has_norm = call.norm, p.has_rope = call.rope, p.pairs_halves = call.pairing == RotaryPairing::kHalf;
  p.eps = static_cast<float>(call.eps);
  const auto as_rows = [&](const at::Tensor& tensor, at::ScalarType dtype) {
    p.row_stride = tensor.size(0) == 1 ? 0 : p.length;
    return tensor.to(dtype).contiguous();
  };
  if (weight) {
    side.weight = weight->to(at::kFloat).contiguous();
    p.weight = side.weight.const_data_ptr<float>();
  }
  if (call.freqs_sin) {
    // One stride of rows serves both.
    const int64_t rows = std::max(call.freqs_sin->size(0), call.freqs_cos->size(0));
    side.sin = as_rows(call.freqs_sin->expand({rows, -1, -1}), at::kFloat);
    side.cos = as_rows(call.freqs_cos->expand({rows, -1, -1}), at::kFloat);
    p.rotary_dim = 2 * side.sin.size(2);
    p.sin = side.sin.const_data_ptr<float>();
    p.cos = side.cos.const_data_ptr<float>();
  } else if (call.rope) {
    p.rotary_dim = p.dim;
    side.quarter_turns = quarter_turns(p.dim, call.theta);
    p.quarter_turns = side.quarter_turns.data();
    if (call.positions) {
      side.positions = as_rows(*call.positions, at::kDouble);
      p.positions = side.positions.const_data_ptr<double>();
    }
  }
  const int64_t tokens = p.tokens(), token_elements = std::max<int64_t>(p.heads * p.dim, 1);
  side.range = std::max({int64_t{1}, kRangeElements / token_elements, (tokens + kMostRanges - 1) / kMostRanges});
  side.ranges = side.result.numel() == 0 ? 0 : (tokens + side.range - 1) / side.range;
  side.kernels = &select_norm_rope_kernels(result.scalar_type());
  return side;
}

/// run(side, range, first token, last token) for the ranges of both, on all threads.
template <typename Run>
void for_each_range(const Side& q, const Side& k, const Run& run) {
  at::parallel_for(0, q.ranges + k.ranges, 1, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const Side& side = index < q.ranges ? q : k;
      const int64_t range = index < q.ranges ? index : index - q.ranges, first_token = range * side.range;
      run(side, range, first_token, std::min(first_token + side.range, side.problem.tokens()));
    }
  });
}

NormRopeHeads qk_norm_rope_cpu(const NormRopeCall& call) {
  if (!has_kernel(call.q) || !has_kernel(call.k)) return compose_norm_rope(call);
  const Side q = make_side(call, call.q, /*grad=*/{}, call.q_weight, contiguous_like(call.q));
  const Side k = make_side(call, call.k, /*grad=*/{}, call.k_weight, contiguous_like(call.k));
  for_each_range(q, k, [](const Side& side, int64_t, int64_t first_token, int64_t last_token) {
    side.kernels->forward(side.problem, first_token, last_token);
  });
  return {q.result, k.result};
}

/// The ranges' sums (ranges, D), added in their order, whatever thread computed them.
at::Tensor sum_of_ranges(const at::Tensor& sums, const OptionalTensor& weight, const at::Tensor& grad) {
  if (!weight) return at::empty({0}, grad.options());
  const int64_t dim = weight->size(0);
  at::Tensor total = at::zeros({dim}, sums.options());
  float* const to = total.mutable_data_ptr<float>();
  const float* from = sums.const_data_ptr<float>();
  for (int64_t range = 0; range < sums.size(0); ++range, from += dim) {
    for (int64_t i = 0; i < dim; ++i) to[i] += from[i];
  }
  return total.to(weight->scalar_type());
}

/// dq and dk may be grad_q and grad_k: a head is read whole before it is written.
NormRopeWeightGradients run_backward(const NormRopeCall& call, const at::Tensor& grad_q, const at::Tensor& grad_k,
                                     const at::Tensor& dq, const at::Tensor& dk) {
  const bool reads_input = call.norm;
  const Side q = make_side(call, reads_input ? call.q : at::Tensor(), grad_q, call.q_weight, dq);
  const Side k = make_side(call, reads_input ? call.k : at::Tensor(), grad_k, call.k_weight, dk);
  const auto zeros = [](const Side& side) {
    const int64_t rows = side.problem.weight ? side.ranges : 0;
    return at::zeros({rows, side.problem.dim}, side.result.options().dtype(at::kFloat));
  };
  const at::Tensor q_sums = zeros(q), k_sums = zeros(k);
  for_each_range(q, k, [&](const Side& side, int64_t range, int64_t first_token, int64_t last_token) {
    const at::Tensor& sums = &side == &q ? q_sums : k_sums;
    float* const sum = side.problem.weight ? sums.mutable_data_ptr<float>() + range * side.problem.dim : nullptr;
    side.kernels->backward(side.problem, first_token, last_token, sum);
  });
  return {sum_of_ranges(q_sums, call.q_weight, grad_q), sum_of_ranges(k_sums, call.k_weight, grad_k)};
}

NormRopeGradients qk_norm_rope_backward_cpu(const NormRopeCall& call, const at::Tensor& grad_q,
                                            const at::Tensor& grad_k) {
  if (!has_kernel(grad_q) || !has_kernel(grad_k)) return compose_norm_rope_backward(call, grad_q, grad_k);
  const at::Tensor dq = contiguous_like(grad_q), dk = contiguous_like(grad_k);
  const auto [dq_weight, dk_weight] = run_backward(call, grad_q, grad_k, dq, dk);
  return {dq, dk, dq_weight, dk_weight};
}

NormRopeWeightGradients qk_norm_rope_backward_in_place_cpu(const NormRopeCall& call, at::Tensor& grad_q,
                                                           at::Tensor& grad_k) {
  if (!has_kernel(grad_q) || !has_kernel(grad_k)) return copy_norm_rope_backward(call, grad_q, grad_k);
  return run_backward(call, grad_q, grad_k, grad_q, grad_k);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CPU, m) {
  using namespace selfattn;
  register_norm_rope<qk_norm_rope_cpu, qk_norm_rope_backward_cpu, qk_norm_rope_backward_in_place_cpu>(m);
}
