#include "rotary/rotary.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/stack.h>
#include <c10/util/Exception.h>
#include <c10/util/MathConstants.h>

#include <cmath>

#include "common/dense_tensor.h"

namespace selfattn {
namespace {

/// Below it the angles of a head's last pairs at far positions are beyond the digits of float64.
constexpr double kLeastTheta = 1e-6;

void check_table(const at::Tensor& table, const HeadsShape& heads, const char* name) {
  check_floating_point(table, name, heads.device, heads.name);
  const auto sizes = table.sym_sizes();
  const bool fits = table.dim() == 3 && (sizes[0] == 1 || sizes[0] == heads.batch) && sizes[1] == heads.length &&
                    sizes[2] * 2 == heads.head_dim;
  TORCH_CHECK_VALUE(fits, "selfattn: ", name, " must have the shape (1 or B, S, D / 2) = (1 or ", heads.batch, ", ",
                    heads.length, ", ", heads.head_dim / 2, ") of ", heads.name, "; got ", sizes);
}

}  // namespace

RotaryPairing parse_pairing(c10::string_view text, const char* name) {
  if (text == "interleaved") return RotaryPairing::kInterleaved;
  TORCH_CHECK_VALUE(text == "half", "selfattn: ", name, " must be 'interleaved' or 'half'; got '", text, "'");
  return RotaryPairing::kHalf;
}

std::string_view to_string(RotaryPairing pairing) {
  return pairing == RotaryPairing::kInterleaved ? "interleaved" : "half";
}

const std::vector<double>& quarter_turns(int64_t head_dim, double theta) {
  thread_local int64_t last_dim = 0;
  thread_local double last_theta = 0.0;
  thread_local std::vector<double> angles;
  if (head_dim != last_dim || theta != last_theta) {
    angles.resize(head_dim / 2);
    for (size_t pair = 0; pair < angles.size(); ++pair) {
      angles[pair] =
          std::pow(theta, -static_cast<double>(2 * pair) / static_cast<double>(head_dim)) * (2.0 / c10::pi<double>);
    }
    last_dim = head_dim;
    last_theta = theta;
  }
  return angles;
}

RotaryTables rotary_tables(const at::Tensor& positions, int64_t head_dim, double theta) {
  const auto options = positions.options().dtype(at::kDouble);
  const at::Tensor exponents = at::arange(0, head_dim, 2, options) / static_cast<double>(head_dim);
  const at::Tensor frequencies = at::pow(theta, -exponents);  // float64: float32 angles lose digits at far positions
  const at::Tensor rows = positions.dim() == 1 ? positions.unsqueeze(0) : positions;
  const at::Tensor angles = rows.to(at::kDouble).unsqueeze(-1) * frequencies;
  return {at::sin(angles), at::cos(angles)};
}

void check_theta(double theta, const char* name) {
  TORCH_CHECK_VALUE(std::isfinite(theta) && theta >= kLeastTheta, "selfattn: ", name,
                    " must be positive and finite, at least ", kLeastTheta, "; got ", theta);
}

void check_positions_dtype(const at::Tensor& positions, const char* name) {
  check_dense(positions, name);
  const auto dtype = positions.scalar_type();
  TORCH_CHECK_TYPE(at::isIntegralType(dtype, /*includeBool=*/false) || is_supported_dtype(dtype), "selfattn: ", name,
                   " must be integers or floating point; got ", dtype);
}

void check_rotation(const HeadsShape& heads, const OptionalTensor& sin, const OptionalTensor& cos,
                    const OptionalTensor& positions, double theta, const char* theta_name) {
  TORCH_CHECK_VALUE(sin.has_value() == cos.has_value(),
                    "selfattn: freqs_sin and freqs_cos must be given together; got one alone");
  TORCH_CHECK_VALUE(heads.head_dim % 2 == 0, "selfattn: ", heads.name,
                    " must have an even head dimension for the rotary embedding; got ", heads.head_dim);
  if (sin) {
    TORCH_CHECK_VALUE(!positions, "selfattn: positions must not be given beside freqs_sin and freqs_cos");
    check_table(*sin, heads, "freqs_sin");
    check_table(*cos, heads, "freqs_cos");
    return;
  }
  check_theta(theta, theta_name);
  if (!positions) return;
  check_positions_dtype(*positions, "positions");
  check_device(*positions, "positions", heads.device, heads.name);
  TORCH_CHECK_VALUE(positions->dim() == 2 && positions->sym_size(1) == heads.length &&
                        (positions->sym_size(0) == 1 || positions->sym_size(0) == heads.batch),
                    "selfattn: positions must have the shape (1 or B, S) = (1 or ", heads.batch, ", ", heads.length,
                    ") of ", heads.name, "; got ", positions->sym_sizes());
}

RotaryTables choose_tables(const at::Tensor& x, const OptionalTensor& sin, const OptionalTensor& cos,
                           const OptionalTensor& positions, double theta) {
  if (sin) return {*sin, *cos};
  const int64_t head_dim = x.sym_size(3).guard_int(__FILE__, __LINE__);
  if (positions) return rotary_tables(*positions, head_dim, theta);
  return rotary_tables(at::arange(x.sym_size(1), x.options().dtype(at::kLong).requires_grad(false)), head_dim, theta);
}

std::pair<RotaryTables, RotaryTables> choose_tables_of_both(const at::Tensor& q, const at::Tensor& k,
                                                            const OptionalTensor& sin, const OptionalTensor& cos,
                                                            const OptionalTensor& positions, double theta) {
  const RotaryTables of_q = choose_tables(q, sin, cos, positions, theta);
  const bool are_alike = q.device() == k.device() && q.sym_size(0) == k.sym_size(0) && q.sym_size(1) == k.sym_size(1) &&
                         q.sym_size(3) == k.sym_size(3);
  return {of_q, are_alike ? of_q : choose_tables(k, sin, cos, positions, theta)};
}

at::Tensor rotate(const at::Tensor& x, const RotaryTables& tables, RotaryPairing pairing) {
  const at::Tensor heads = x.to(compute_dtype(x));
  const at::Tensor sin = tables.sin.to(heads.scalar_type()).unsqueeze(2);  // (1 or B, S, 1, D / 2)
  const at::Tensor cos = tables.cos.to(heads.scalar_type()).unsqueeze(2);
  const c10::SymInt half = heads.sym_size(3) / 2;
  if (pairing == RotaryPairing::kInterleaved) {
    const at::Tensor even = heads.slice_symint(3, 0, std::nullopt, 2), odd = heads.slice_symint(3, 1, std::nullopt, 2);
    return at::stack({even * cos - odd * sin, even * sin + odd * cos}, -1).flatten(3, 4);
  }
  const at::Tensor low = heads.narrow_symint(3, 0, half), high = heads.narrow_symint(3, half, half);
  return at::cat({low * cos - high * sin, low * sin + high * cos}, -1);
}

}  // namespace selfattn
