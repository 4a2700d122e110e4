// selfattn::kv_cache_positions and positions_of_append on CUDA: tensors -> params -> launch.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "binding.h"
#include "kv_cache/positions.h"
#include "kv_cache/positions_params.h"

namespace selfattn::cuda {
namespace {

int64_t as_int(const c10::SymInt& size) { return size.guard_int(__FILE__, __LINE__); }

bool has_kernel(const PositionsCall& call) {
  const int64_t rows = call.lengths.size(0), batch = as_int(call.batch()), columns = as_int(call.num_tokens);
  return rows <= kMostTokens && (columns == 0 || batch <= kMostTokens / columns) &&
         kv_cache_positions_run_on(call.lengths.device().index());
}

/// Bounds that mean the same: nothing fits below 0, and what the type of lengths does not hold cannot be stored.
int64_t capacity_of(const PositionsCall& call) {
  const bool is_narrow = call.lengths.scalar_type() == at::kInt;
  const int64_t most = is_narrow ? std::numeric_limits<int>::max() : std::numeric_limits<int64_t>::max();
  return std::clamp<int64_t>(as_int(call.capacity), -1, most);
}

/// The positions. `lengths_after`: where the lengths, which then do not count the tokens, go with them.
at::Tensor place_tokens(const PositionsCall& call, const OptionalTensor& lengths_after) {
  const c10::cuda::CUDAGuard guard(call.lengths.device());
  const int64_t batch = as_int(call.batch()), columns = as_int(call.num_tokens);
  const at::Tensor positions = empty({batch, columns}, at::kLong, call.lengths.device());
  PositionsParams params{};
  params.rows = static_cast<int>(call.lengths.size(0));
  params.tokens = static_cast<int>(batch * columns);
  params.columns = static_cast<int>(columns);
  params.by_columns = Divisor::of(std::max(params.columns, 1));
  params.capacity = capacity_of(call);
  params.lengths = integers_of(call.lengths);
  params.segment_ids = integers_of(call.segment_ids);
  params.given = integers_of(call.positions);
  params.lengths_after = lengths_after ? lengths_after->mutable_data_ptr() : nullptr;
  params.positions = positions.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(launch_kv_cache_positions(params, at::cuda::getCurrentCUDAStream()));
  return positions;
}

at::Tensor kv_cache_positions_cuda(const PositionsCall& call) {
  return has_kernel(call) ? place_tokens(call, std::nullopt) : compose_positions(call);
}

LengthsAndPositions positions_of_append_cuda(const PositionsCall& call) {
  if (!has_kernel(call)) return compose_positions_of_append(call);
  const at::Tensor lengths = empty_like_contiguous(call.lengths);
  return {lengths, place_tokens(call, lengths)};
}

}  // namespace
}  // namespace selfattn::cuda

TORCH_LIBRARY_IMPL(selfattn, CUDA, m) {
  using namespace selfattn;
  m.impl("kv_cache_positions", TORCH_FN(positions_from_schema<selfattn::cuda::kv_cache_positions_cuda>));
  m.impl("positions_of_append", TORCH_FN(append_positions_from_schema<selfattn::cuda::positions_of_append_cuda>));
}
