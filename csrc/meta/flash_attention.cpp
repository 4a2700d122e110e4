// Shapes and dtypes of the kernel operators' results, for tracing. Every result is contiguous.
#include <torch/library.h>

#include "attention/flash_attention_op.h"

namespace selfattn {
namespace {

InputGradients empty_gradients_of(const AttentionProblem& problem, const AttentionGradients&) {
  return empty_gradients(problem);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, Meta, m) {
  using namespace selfattn;
  m.impl("flash_attention", TORCH_FN(flash_attention_from_schema<checked<empty_results>>));
  m.impl("flash_attention_backward", TORCH_FN(FlashAttentionBackward::from_schema<checked<empty_gradients_of>>));
}
