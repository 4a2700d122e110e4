// selfattn::qk_norm_rope, its gradient, qk_norm_rope_append and append_kv_cache on CUDA: tensors -> params -> launch.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/constant_pad_nd.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "binding.h"
#include "kv_cache/append.h"
#include "qk_norm_rope/append_params.h"
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

/// Whether heads begin at multiples of what vector kernels take at a time.
bool is_usable_by_vectors(const Tensor& x) {
  if (x.size(3) != 1 && x.stride(3) != 1) return false;
  const int64_t elements = static_cast<int64_t>(kVectorBytes) / x.element_size();
  if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kVectorBytes != 0) return false;
  for (int64_t dim = 0; dim < 3; dim++)
    if (x.size(dim) > 1 && x.stride(dim) % elements != 0) return false;
  return true;
}

/// Whether the kernels can read it as it lies and, if it is contiguous, write it.
bool is_usable(const Tensor& x) {
  return has_vector_kernel(x.size(3)) ? is_usable_by_vectors(x) : x.size(3) == 1 || x.stride(3) == 1;
}

/// The tensor itself where the kernels can read it, else a contiguous copy.
Tensor readable(const Tensor& x) { return is_usable(x) ? x : x.clone(at::MemoryFormat::Contiguous); }

HeadsView view_of_heads(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

/// In one of the dtypes that the kernels read.
Tensor with_float_type(const Tensor& tensor) {
  return float_type(tensor.scalar_type()) ? tensor : tensor.to(at::kFloat);
}

/// The vector kernels rotate whole heads: tables of their first elements get angles of 0 for the other pairs. Where a
/// head's halves make pairs, the pairs of its first elements are no pairs of the whole, and the general kernels serve.
bool takes_whole_tables(const NormRopeCall& call, int64_t dim) {
  return call.pairing == RotaryPairing::kInterleaved && has_vector_kernel(dim);
}

/// The angles of heads, and the tensors that they point into.
struct Angles {
  Tensor sin, cos, positions;
  AngleSource source{};

  /// `whole_dim`: the widest heads that take whole tables, or 0.
  Angles(const NormRopeCall& call, int64_t whole_dim) {
    const auto row_stride = [](const Tensor& tensor) { return tensor.size(0) == 1 ? 0 : tensor.stride(0); };
    if (call.freqs_sin) {
      sin = with_float_type(*call.freqs_sin), cos = with_float_type(*call.freqs_cos);
      if (sin.scalar_type() != cos.scalar_type()) sin = sin.to(at::kFloat), cos = cos.to(at::kFloat);
      if (const int64_t missing = whole_dim / 2 - sin.size(2); missing > 0) {
        sin = at::constant_pad_nd(sin, {0, missing}, 0.0), cos = at::constant_pad_nd(cos, {0, missing}, 1.0);
      }
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
  const bool is_partial = call.freqs_sin && !takes_whole_tables(call, x.size(3));
  params.rotary_dim = is_partial ? static_cast<int>(2 * call.freqs_sin->size(2)) : params.dim;
  params.pairs_halves = call.pairing == RotaryPairing::kHalf;
  params.eps = static_cast<float>(call.eps), params.theta = call.theta;
  if (call.rope && !call.freqs_sin && has_vector_kernel(x.size(3))) {
    const std::vector<double>& angles = quarter_turns(x.size(3), call.theta);
    std::copy(angles.begin(), angles.end(), params.quarter_turns);
  }
  return params;
}

/// The heads that a launch reads, or those that it writes, contiguous: others, or the same.
struct Heads {
  const Tensor& q;
  const Tensor& k;
};

int64_t widest_with_whole_tables(const NormRopeCall& call, const Heads& heads) {
  const auto width = [&](const Tensor& x) { return takes_whole_tables(call, x.size(3)) ? x.size(3) : 0; };
  return std::max(width(heads.q), width(heads.k));
}

/// Both sides of a launch, whose input or gradient is not there yet, and the tensors that they point into.
struct Sides {
  Angles angles;
  Tensor heads[2], weights[2];
  NormRopeSide of[2] = {};

  Sides(const NormRopeCall& call, const Heads& from, const Heads& to)
      : angles(call, widest_with_whole_tables(call, from)), heads{readable(from.q), readable(from.k)} {
    const OptionalTensor* const given_weights[] = {&call.q_weight, &call.k_weight};
    for (int i = 0; i < 2; i++) {
      NormRopeSide& side = of[i];
      side.batch = static_cast<int>(heads[i].size(0)), side.length = static_cast<int>(heads[i].size(1));
      side.heads = static_cast<int>(heads[i].size(2));
      side.result = (i == 0 ? to.q : to.k).mutable_data_ptr();
      side.angles = angles.source;
      if (!*given_weights[i]) continue;
      weights[i] = with_float_type(**given_weights[i]).contiguous();
      side.weight = weights[i].const_data_ptr();
      side.weight_type = *float_type(weights[i].scalar_type());
    }
  }
};

/// run(params) for q and k together where one kernel serves both, else for one after the other.
template <typename Run>
void for_each_launch(const NormRopeCall& call, const Sides& sides, const Run& run) {
  const Tensor &q = sides.heads[0], &k = sides.heads[1];
  const int sides_of_launch = q.size(3) == k.size(3) && q.scalar_type() == k.scalar_type() ? 2 : 1;
  for (int first = 0; first < 2; first += sides_of_launch) {
    NormRopeParams params = make_params(call, sides.heads[first]);
    params.num_sides = sides_of_launch;
    std::copy_n(sides.of + first, sides_of_launch, params.sides);
    run(params);
  }
}

/// `rotates_back`: the transposed rotation, which is the gradient of a call without norm.
void launch_forward(const NormRopeCall& call, const Heads& from, const Heads& to, bool rotates_back) {
  const c10::cuda::CUDAGuard guard(from.q.device());
  Sides sides(call, from, to);
  for (int i = 0; i < 2; i++) sides.of[i].input = view_of_heads(sides.heads[i]);
  for_each_launch(call, sides, [&](NormRopeParams& params) {
    params.rotates_back = rotates_back;
    C10_CUDA_CHECK(schedule_qk_norm_rope(params, /*is_backward=*/false));
    C10_CUDA_CHECK(launch_qk_norm_rope(params, /*is_backward=*/false, at::cuda::getCurrentCUDAStream()));
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
  const auto no_gradient = [](const Tensor& grad) { return empty({0}, grad.scalar_type(), grad.device()); };
  if (!call.norm) {
    launch_forward(call, from, to, /*rotates_back=*/true);
    return {no_gradient(from.q), no_gradient(from.k)};
  }
  const c10::cuda::CUDAGuard guard(from.q.device());
  Sides sides(call, from, to);
  const Tensor inputs[] = {readable(call.q), readable(call.k)};
  Tensor weight_gradients[2];
  for (int i = 0; i < 2; i++) {
    NormRopeSide& side = sides.of[i];
    side.input = view_of_heads(inputs[i]);
    side.grad = view_of_heads(sides.heads[i]);
    weight_gradients[i] = side.weight ? empty_like_contiguous(sides.weights[i]) : no_gradient(sides.heads[i]);
    if (side.weight) side.weight_gradient = weight_gradients[i].mutable_data_ptr();
  }
  for_each_launch(call, sides, [&](NormRopeParams& params) {
    C10_CUDA_CHECK(schedule_qk_norm_rope(params, /*is_backward=*/true));
    int64_t rows = 0;
    for (int i = 0; i < params.num_sides; i++) rows += params.sides[i].weight ? params.sides[i].blocks : 0;
    const Tensor sums = empty({rows, params.dim}, at::kFloat, from.q.device());
    float* row = sums.mutable_data_ptr<float>();
    for (int i = 0; i < params.num_sides; i++) {
      NormRopeSide& side = params.sides[i];
      if (!side.weight) continue;
      side.partial_sums = row;
      row += static_cast<int64_t>(side.blocks) * params.dim;
    }
    C10_CUDA_CHECK(launch_qk_norm_rope(params, /*is_backward=*/true, at::cuda::getCurrentCUDAStream()));
  });
  if (call.q_weight) weight_gradients[0] = weight_gradients[0].to(call.q_weight->scalar_type());
  if (call.k_weight) weight_gradients[1] = weight_gradients[1].to(call.k_weight->scalar_type());
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
  const ResultMemory dq(grad_q, is_usable(grad_q)), dk(grad_k, is_usable(grad_k));
  NormRopeWeightGradients weight_gradients = launch_backward(call, {grad_q, grad_k}, {dq.rows(), dk.rows()});
  dq.hand_over(), dk.hand_over();
  return weight_gradients;
}

// ---------------------------------------------------------------- into a KV cache

/// Whether the kernel can write tokens into the cache as it lies.
bool is_writable_cache(const Tensor& cache) {
  const int64_t elements = static_cast<int64_t>(kVectorBytes) / cache.element_size();
  return cache.stride(3) == 1 && cache.size(3) % elements == 0 && is_usable_by_vectors(cache);
}

bool has_append_kernel(const NormRopeCall& heads, const AppendCall& call, const NormRopeParams& params) {
  return params.element != FloatType::kFloat && takes_vector_kernel(params) && has_kernel(heads.k) &&
         call.value.size(2) == heads.k.size(2) && is_writable_cache(call.key_cache) &&
         is_writable_cache(call.value_cache) && qk_norm_rope_runs_on(heads.k.device().index());
}

CacheView view_of_cache(const Tensor& cache) {
  return {cache.data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

/// `heads`: of q, which has none where keys and values alone are written, and of k. Whether there is a kernel, which
/// has then been launched.
bool launch_append(const NormRopeCall& heads, const AppendCall& call, const Tensor& query_result) {
  if (!float_type(heads.k.scalar_type())) return false;
  AppendParams params{};
  params.norm_rope = make_params(heads, heads.k);
  if (!has_append_kernel(heads, call, params.norm_rope)) return false;
  const c10::cuda::CUDAGuard guard(heads.k.device());
  // k's own result is nobody's: keys leave for the cache.
  Sides sides(heads, {heads.q, heads.k}, {query_result, query_result});
  for (int i = 0; i < 2; i++) {
    sides.of[i].input = view_of_heads(sides.heads[i]);
    params.norm_rope.sides[i] = sides.of[i];
  }
  params.norm_rope.num_sides = 2;
  const Tensor values = is_usable_by_vectors(call.value) ? call.value : call.value.clone(at::MemoryFormat::Contiguous);
  params.values = view_of_heads(values);
  params.dim_v = static_cast<int>(call.value.size(3));
  params.key_cache = view_of_cache(call.key_cache), params.value_cache = view_of_cache(call.value_cache);
  params.pages = static_cast<int>(call.key_cache.size(0)), params.page_size = static_cast<int>(call.key_cache.size(1));
  params.rows = call.page_table ? static_cast<int>(call.page_table->size(0)) : params.pages;
  params.pages_per_row = call.page_table ? static_cast<int>(call.page_table->size(1)) : 1;
  params.positions = integers_of(call.positions);
  params.page_table = integers_of(call.page_table);
  params.segment_ids = integers_of(call.segment_ids);
  C10_CUDA_CHECK(launch_qk_norm_rope_append(params, at::cuda::getCurrentCUDAStream()));
  return true;
}

Tensor qk_norm_rope_append_cuda(const NormRopeAppendCall& call) {
  const NormRopeCall& heads = call.norm_rope;
  const Tensor q = empty_like_contiguous(heads.q);
  const bool is_done =
      has_kernel(heads.q) && heads.q.size(3) == heads.k.size(3) && launch_append(heads, call.append, q);
  return is_done ? q : compose_norm_rope_append(call);
}

void append_kv_cache_cuda(const AppendCall& call) {
  const Tensor no_query = call.key.narrow(2, 0, 0);
  if (!launch_append({.q = no_query, .k = call.key, .norm = false, .rope = false}, call, no_query))
    compose_append(call);
}

}  // namespace
}  // namespace selfattn::cuda

TORCH_LIBRARY_IMPL(selfattn, CUDA, m) {
  using namespace selfattn;
  using namespace selfattn::cuda;
  m.impl("qk_norm_rope_append", TORCH_FN(norm_rope_append_from_schema<qk_norm_rope_append_cuda>));
  m.impl("append_kv_cache", TORCH_FN(append_from_schema<append_kv_cache_cuda>));
  selfattn::register_norm_rope<qk_norm_rope_cuda, qk_norm_rope_backward_cuda, qk_norm_rope_backward_in_place_cuda>(m);
}
