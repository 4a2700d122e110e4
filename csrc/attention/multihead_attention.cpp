// The public operators: validate, choose a backend, call it.
#include <torch/library.h>

#include "attention/select_backend.h"

namespace selfattn {
namespace {

#define SELFATTN_PARAMETERS                                                                                      \
  const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, const OptionalTensor &segment_ids, bool causal, \
      std::optional<double> qk_scale, c10::string_view backend, const OptionalTensor &kv_segment_ids,            \
      int64_t window_left, int64_t window_right, double softcap, const OptionalTensor &sinks
#define SELFATTN_ARGUMENTS {segment_ids, causal, qk_scale, kv_segment_ids, window_left, window_right, softcap, sinks}

at::Tensor multihead_attention(SELFATTN_PARAMETERS) {
  const Backend name = parse_backend(backend);
  const AttentionProblem problem = make_attention_problem(q, k, v, SELFATTN_ARGUMENTS);
  return std::get<0>(select_backend(name, problem).call(problem));
}

std::tuple<at::Tensor, at::Tensor> multihead_attention_lse(SELFATTN_PARAMETERS) {
  const Backend name = parse_backend(backend);
  const AttentionProblem problem = make_attention_problem(q, k, v, SELFATTN_ARGUMENTS, /*needs_lse=*/true);
  return select_backend(name, problem).call(problem);
}

std::string explain_backend(SELFATTN_PARAMETERS) {
  const Backend name = parse_backend(backend);
  return explain_selection(name, make_attention_problem(q, k, v, SELFATTN_ARGUMENTS));
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  m.impl("multihead_attention", TORCH_FN(selfattn::multihead_attention));
  m.impl("multihead_attention_lse", TORCH_FN(selfattn::multihead_attention_lse));
  m.impl("explain_backend", TORCH_FN(selfattn::explain_backend));
}
