// segment_mask, and the converters between segment ids, positions and cumulative lengths. No host read, no
// synchronisation.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "common/dense_tensor.h"
#include "common/optional_tensor.h"
#include "segment/segment_ids.h"

namespace selfattn {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 30;  // of a row

void check_size(int64_t size, const char* name) {
  TORCH_CHECK_VALUE(size >= 0, "selfattn: ", name, " must be at least 0; got ", size);
  TORCH_CHECK_VALUE(size <= kMostTokens, "selfattn: ", name, " must be at most ", kMostTokens, "; got ", size);
}

void check_integers_of_shape(const at::Tensor& tensor, const char* name, int64_t dim, const char* shape) {
  check_integers(tensor, name);
  TORCH_CHECK_VALUE(tensor.dim() == dim, "selfattn: ", name, " must have the shape ", shape, "; got ",
                    tensor.sym_sizes());
}

/// Runs start where `is_break` (B, S - 1) holds between a token and its left neighbour, and at token 0.
at::Tensor run_starts(const at::Tensor& tokens, const at::Tensor& is_break) {
  const at::Tensor first = at::ones_like(tokens.narrow_symint(1, 0, tokens.sym_size(1) == 0 ? 0 : 1), at::kBool);
  return at::cat({first, is_break}, 1);
}

at::Tensor left_neighbours(const at::Tensor& tokens) { return tokens.slice_symint(1, 0, -1); }
at::Tensor right_neighbours(const at::Tensor& tokens) { return tokens.slice_symint(1, 1); }

at::Tensor mask_of_segments(const at::Tensor& segment_ids, const OptionalTensor& kv_segment_ids) {
  const at::Tensor query = as_int32(segment_ids, "segment_ids");
  if (!kv_segment_ids) return same_segment(query, query);
  const at::Tensor key = as_int32(*kv_segment_ids, "kv_segment_ids");
  check_device(key, "kv_segment_ids", query.device(), "segment_ids");
  TORCH_CHECK_VALUE(key.sym_size(0) == query.sym_size(0), "selfattn: kv_segment_ids must have the batch size of ",
                    "segment_ids, ", query.sym_size(0), "; got ", key.sym_size(0));
  return same_segment(query, key);
}

at::Tensor ids_from_positions(const at::Tensor& positions) {
  check_integers_of_shape(positions, "positions", 2, "(B, S)");
  const at::Tensor starts = run_starts(positions, right_neighbours(positions) != left_neighbours(positions) + 1);
  return (at::cumsum(starts, 1, at::kInt) - 1).to(at::kInt);
}

at::Tensor ids_from_cu_seqlens(const at::Tensor& cu_seqlens, int64_t length) {
  check_integers_of_shape(cu_seqlens, "cu_seqlens", 1, "(N + 1,)");
  TORCH_CHECK_VALUE(cu_seqlens.sym_size(0) >= 1, "selfattn: cu_seqlens must hold at least one boundary; got none");
  check_size(length, "length");
  const at::Tensor tokens = at::arange(length, cu_seqlens.options());
  const at::Tensor ids = at::searchsorted(cu_seqlens, tokens, /*out_int32=*/true, /*right=*/true) - 1;
  return at::where(ids < cu_seqlens.sym_size(0) - 1, ids, -1).to(at::kInt);
}

at::Tensor cu_seqlens_from_ids(const at::Tensor& segment_ids, int64_t max_segments) {
  check_integers_of_shape(segment_ids, "segment_ids", 2, "(B, S)");
  check_size(max_segments, "max_segments");
  const c10::SymInt batch = segment_ids.sym_size(0), length = segment_ids.sym_size(1);
  const auto options = segment_ids.options().dtype(at::kInt);
  const at::Tensor starts = run_starts(segment_ids, right_neighbours(segment_ids) != left_neighbours(segment_ids));
  const at::Tensor run = at::cumsum(starts, 1) - 1;  // (B, S)
  check_values(run < max_segments, c10::str("selfattn: max_segments must be at least the number of runs of equal ids ",
                                            "in a row of segment_ids; got ", max_segments));
  // Each run's first token goes to the run's column, every other token to a last column that is dropped.
  const int64_t dropped = max_segments + 1;
  const at::Tensor column = at::where(at::logical_and(starts, run < max_segments), run, dropped);
  const at::Tensor position = at::arange(length, options).unsqueeze(0).expand_symint({batch, length});
  return at::full_symint({batch, dropped + 1}, length, options).scatter(1, column, position).narrow(1, 0, dropped);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  using namespace selfattn;
  m.impl("segment_mask", TORCH_FN(mask_of_segments));
  m.impl("segment_ids_from_positions", TORCH_FN(ids_from_positions));
  m.impl("segment_ids_from_cu_seqlens", TORCH_FN(ids_from_cu_seqlens));
  m.impl("cu_seqlens_from_segment_ids", TORCH_FN(cu_seqlens_from_ids));
}
