#include "backend/kernel_inputs.h"

#include <ATen/TensorOperators.h>

#include <cmath>
#include <limits>

namespace selfattn {
namespace {

double smallest_scale(at::ScalarType dtype) {
  return dtype == at::kDouble ? std::numeric_limits<double>::min()
                              : static_cast<double>(std::numeric_limits<float>::min());
}

void make_scale_positive(AttentionProblem& problem) {
  const double magnitude = std::abs(problem.scale);
  if (magnitude < smallest_scale(problem.query.scalar_type())) {
    problem.query = problem.query * problem.scale;
    problem.scale = 1.0;
  } else if (problem.scale < 0.0) {
    problem.query = problem.query.neg();
    problem.scale = magnitude;
  }
}

/// A copy and not contiguous(): that returns a tensor whose last dimension holds one element as it is.
at::Tensor with_contiguous_last_dimension(const at::Tensor& tensor) {
  return tensor.sym_stride(-1) == 1 ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

}  // namespace

AttentionProblem adapted_to_pytorch_kernels(AttentionProblem problem) {
  make_scale_positive(problem);
  problem.query = with_contiguous_last_dimension(problem.query);
  problem.key = with_contiguous_last_dimension(problem.key);
  problem.value = with_contiguous_last_dimension(problem.value);
  return problem;
}

}  // namespace selfattn
