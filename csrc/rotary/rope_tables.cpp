// rope_tables: the tables of rotary embeddings for long contexts, of whole heads and of their first part.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/function_transform.h"
#include "common/plain_tensor.h"
#include "rotary/frequencies.h"
#include "rotary/rotary.h"

namespace selfattn {
namespace {

/// Numbers of the host as a float64 tensor (N,) on the device of `beside`. No copy from the host's memory, which a CUDA
/// graph would make again when that memory is gone: kernels get the numbers as their arguments.
at::Tensor constant(const std::vector<double>& numbers, const at::Tensor& beside) {
  const auto options = at::TensorOptions().dtype(at::kDouble).device(beside.device());
  const bool is_plain_tensor = is_plain(beside) && !is_function_transform_active();
  if (is_plain_tensor && beside.is_cpu()) return at::tensor(numbers, options);
  if (is_plain_tensor && beside.is_cuda()) {
    const std::vector<at::Scalar> scalars(numbers.begin(), numbers.end());
    return at::stack(at::_foreach_add(at::zeros({static_cast<int64_t>(numbers.size())}, options).unbind(), scalars));
  }
  std::vector<at::Tensor> elements;
  for (const double number : numbers) {
    // In two parts that float32 holds: PyTorch's exporter to ONNX rounds the numbers of a graph to it.
    const double part = static_cast<float>(number);
    elements.push_back(at::full({}, part, options) + (number - part));
  }
  return at::stack(elements);
}

std::tuple<at::Tensor, at::Tensor> make_rope_tables(
    int64_t rotary_dim, const OptionalTensor& positions, std::optional<c10::SymInt> max_length,
    c10::string_view rope_type, double rope_theta, std::optional<c10::SymInt> length, std::optional<double> factor,
    std::optional<int64_t> original_max_position_embeddings, std::optional<double> low_freq_factor,
    std::optional<double> high_freq_factor, std::optional<double> attention_factor_, std::optional<double> beta_fast,
    std::optional<double> beta_slow, std::optional<double> mscale, std::optional<double> mscale_all_dim,
    std::optional<bool> truncate, std::optional<at::ArrayRef<double>> short_factor,
    std::optional<at::ArrayRef<double>> long_factor, std::optional<at::ScalarType> dtype,
    std::optional<at::Device> device) {
  RopeParameters parameters(rotary_dim);
  parameters.rope_type(std::string(rope_type)).rope_theta(rope_theta).factor(factor);
  parameters.original_max_position_embeddings(original_max_position_embeddings);
  parameters.low_freq_factor(low_freq_factor).high_freq_factor(high_freq_factor);
  parameters.attention_factor(attention_factor_).beta_fast(beta_fast).beta_slow(beta_slow);
  parameters.mscale(mscale).mscale_all_dim(mscale_all_dim).truncate(truncate);
  if (short_factor) parameters.short_factor(short_factor->vec());
  if (long_factor) parameters.long_factor(long_factor->vec());
  check(parameters);
  const at::Tensor rows = table_positions(rotary_dim, positions, "positions", max_length, dtype, device);
  TORCH_CHECK_VALUE(!length || *length >= 0, "selfattn: length must be at least 0; got ", *length);
  RotaryTables tables;
  if (rope_type == "default") {
    tables = rotary_tables(rows, rotary_dim, rope_theta);
  } else {
    const c10::SymInt longest = length.value_or(rows.sym_size(-1));
    const int64_t known = depends_on_length(parameters) ? longest.guard_int(__FILE__, __LINE__) : 0;
    tables = rotary_tables(rows, constant(inverse_frequencies(parameters, known), rows));
    const double scale = attention_factor(parameters);
    if (scale != 1.0) tables = {tables.sin * scale, tables.cos * scale};
  }
  return {tables.sin.to(dtype.value_or(at::kFloat)), tables.cos.to(dtype.value_or(at::kFloat))};
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  using namespace selfattn;
  m.impl("rope_tables", TORCH_FN(make_rope_tables));
}
