// Merges two partial attentions over disjoint sets of keys, in ATen operators.
#include <ATen/TensorOperators.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "attention/problem.h"
#include "common/dense_tensor.h"

namespace selfattn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void check_out(const at::Tensor& out) {
  TORCH_CHECK_TYPE(is_supported_dtype(out.scalar_type()),
                   "selfattn: out must be float64, float32, bfloat16 or float16; got ", out.scalar_type());
  TORCH_CHECK_VALUE(out.dim() == 4, "selfattn: out must have four dimensions (B, Sq, NH, DV); got shape ",
                    out.sym_sizes());
}

void check_lse(const at::Tensor& lse, const char* name, const at::Tensor& out) {
  TORCH_CHECK_TYPE(lse.scalar_type() == at::kFloat || lse.scalar_type() == at::kDouble, "selfattn: ", name,
                   " must be float32 or float64; got ", lse.scalar_type());
  check_device(lse, name, out.device(), "out");
  const auto sizes = out.sym_sizes();
  TORCH_CHECK_VALUE(
      lse.dim() == 3 && lse.sym_size(0) == sizes[0] && lse.sym_size(1) == sizes[2] && lse.sym_size(2) == sizes[1],
      "selfattn: ", name, " must have the shape (B, NH, Sq) = [", sizes[0], ", ", sizes[2], ", ", sizes[1], "]; got ",
      lse.sym_sizes());
}

void check_arguments(const at::Tensor& out, const at::Tensor& lse, const at::Tensor& other_out,
                     const at::Tensor& other_lse) {
  check_dense(out, "out"), check_dense(lse, "lse");
  check_dense(other_out, "other_out"), check_dense(other_lse, "other_lse");
  check_out(out);
  check_lse(lse, "lse", out);
  check_dtype(other_out, "other_out", out.scalar_type(), "out");
  check_device(other_out, "other_out", out.device(), "out");
  TORCH_CHECK_VALUE(other_out.sym_sizes() == out.sym_sizes(), "selfattn: other_out must have the shape of out, ",
                    out.sym_sizes(), "; got ", other_out.sym_sizes());
  check_dtype(other_lse, "other_lse", lse.scalar_type(), "lse");
  check_lse(other_lse, "other_lse", out);
}

/// (B, NH, Sq) -> (B, Sq, NH, 1).
at::Tensor as_column(const at::Tensor& rows) { return rows.transpose(1, 2).unsqueeze(-1); }

/// One of the two parts, in the precision of the computation.
struct Part {
  at::Tensor out;  // (B, Sq, NH, DV)
  at::Tensor lse;  // (B, NH, Sq)

  Part(const at::Tensor& any_out, const at::Tensor& any_lse, at::ScalarType dtype)
      // What a row without keys holds is not looked at, and takes no gradient.
      : out(any_out.to(dtype).masked_fill(as_column(any_lse == -kInfinity), 0.0)), lse(any_lse.to(dtype)) {}

  /// Its share of the softmax's denominator, times exp(-shift) (B, NH, Sq). Beside an lse of +inf, which takes all the
  /// weight, every other is nothing. An infinite logarithm takes no part in the sums and has no gradient from them.
  at::Tensor weight(const at::Tensor& shift, const at::Tensor& has_top) const {
    const at::Tensor is_top = lse == kInfinity;
    const at::Tensor finite =
        lse.masked_fill(is_top, 0.0)
            .masked_fill((lse == -kInfinity).logical_or(has_top.logical_and(is_top.logical_not())), -kInfinity);
    return at::exp(finite - shift);
  }
};

std::tuple<at::Tensor, at::Tensor> merge_parts(const at::Tensor& out, const at::Tensor& lse,
                                               const at::Tensor& other_out, const at::Tensor& other_lse) {
  check_arguments(out, lse, other_out, other_lse);
  const bool is_double = out.scalar_type() == at::kDouble || lse.scalar_type() == at::kDouble;
  const at::ScalarType dtype = is_double ? at::kDouble : at::kFloat;
  const Part left(out, lse, dtype), right(other_out, other_lse, dtype);

  const at::Tensor larger = at::maximum(left.lse, right.lse);
  const at::Tensor has_top = larger == kInfinity;
  const at::Tensor shift = larger.detach().masked_fill(larger.isinf(), 0.0);
  const at::Tensor left_weight = left.weight(shift, has_top), right_weight = right.weight(shift, has_top);
  const at::Tensor sum = left_weight + right_weight;
  const at::Tensor is_empty = sum == 0.0;
  const at::Tensor safe_sum = sum.masked_fill(is_empty, 1.0);

  const at::Tensor merged_out =
      as_column(left_weight / safe_sum) * left.out + as_column(right_weight / safe_sum) * right.out;
  const at::Tensor merged_lse = (at::log(safe_sum) + shift).masked_fill(is_empty, -kInfinity);
  return {merged_out.to(out.scalar_type()), at::where(has_top, larger, merged_lse).to(lse.scalar_type())};
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  using namespace selfattn;
  m.impl("merge_attention", TORCH_FN(merge_parts));
}
