// The public operators: validate, choose a backend, call it.
#include "attention/multihead_attention.h"

#include <torch/library.h>

#include "attention/select_backend.h"

namespace selfattn {
namespace {

using at::Tensor;

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionArguments& arguments,
              c10::string_view backend) {
  const Backend name = parse_backend(backend);
  const AttentionProblem problem = make_attention_problem(q, k, v, arguments);
  return std::get<0>(select_backend(name, problem).call(problem));
}

std::tuple<Tensor, Tensor> attend_lse(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const AttentionArguments& arguments, c10::string_view backend) {
  const Backend name = parse_backend(backend);
  const AttentionProblem problem = make_attention_problem(q, k, v, arguments, /*needs_lse=*/true);
  return select_backend(name, problem).call(problem);
}

std::string explain(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionArguments& arguments,
                    c10::string_view backend) {
  const Backend name = parse_backend(backend);
  return explain_selection(name, make_attention_problem(q, k, v, arguments));
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  using namespace selfattn;
  m.impl("multihead_attention", TORCH_FN((multihead_from_schema<at::Tensor, attend>)));
  m.impl("multihead_attention_lse", TORCH_FN((multihead_from_schema<std::tuple<at::Tensor, at::Tensor>, attend_lse>)));
  m.impl("explain_backend", TORCH_FN((multihead_from_schema<std::string, explain>)));
}
