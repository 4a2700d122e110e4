// selfattn::flash_attention on CUDA: tensors -> params -> launch.
#include <torch/library.h>

#include "attention/flash_attention_op.h"
#include "forward.h"
#include "ordered_call.h"

namespace selfattn::cuda {
namespace {

/// `problem` with positions: of tokens in order.
AttentionResults attend_rows(const AttentionProblem& problem) {
  const ForwardCall call{.query = problem.query,
                         .key = problem.key,
                         .value = problem.value,
                         .sinks = problem.sinks,
                         .scale = problem.scale,
                         .softcap = problem.softcap,
                         .shape = shape_of(problem.query, problem.key, problem.value),
                         .window = window_of(problem)};
  return run_forward(call, [&](const TileSizes& tiles) -> std::optional<SegmentProblem> {
    if (!problem.has_segments()) return std::nullopt;
    return segment_problem(problem, tiles, SegmentSide::kQueries);
  });
}

AttentionResults attend(const AttentionProblem& problem) {
  if (!problem.has_positions()) return attend_rows(problem);
  const OrderedCall call(problem);
  return call.as_called(attend_rows(call.problem()));
}

}  // namespace
}  // namespace selfattn::cuda

TORCH_LIBRARY_IMPL(selfattn, CUDA, m) {
  using namespace selfattn;
  m.impl("flash_attention", TORCH_FN(flash_attention_from_schema<checked<selfattn::cuda::attend>>));
}
