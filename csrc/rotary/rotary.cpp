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

// Far beyond any model; without limits a slip of the caller's would ask for all memory.
constexpr int64_t kMostFeatures = int64_t{1} << 20, kMostElements = int64_t{1} << 30;

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
  return rotary_tables(positions, at::pow(theta, -exponents));
}

RotaryTables rotary_tables(const at::Tensor& positions, const at::Tensor& frequencies) {
  const at::Tensor rows = positions.dim() == 1 ? positions.unsqueeze(0) : positions;
  const at::Tensor angles = rows.to(at::kDouble).unsqueeze(-1) * frequencies;
  return {at::sin(angles), at::cos(angles)};
}

at::Tensor table_positions(int64_t rotary_dim, const OptionalTensor& positions, const char* name,
                           const std::optional<c10::SymInt>& max_length, std::optional<at::ScalarType> dtype,
                           std::optional<at::Device> device) {
  TORCH_CHECK_VALUE(positions.has_value() != max_length.has_value(), "selfattn: exactly one of ", name,
                    " and max_length must be given; got ", positions.has_value() ? "both" : "neither");
  TORCH_CHECK_TYPE(!dtype || at::isFloatingType(*dtype), "selfattn: dtype must be floating point; got ", *dtype);
  if (positions) {
    check_positions_dtype(*positions, name);
    TORCH_CHECK_VALUE(positions->dim() == 1 || positions->dim() == 2, "selfattn: ", name,
                      " must have the shape (S,) or (B, S); got ", positions->sym_sizes());
    TORCH_CHECK_TYPE(!device || !positions->is_meta() || device->is_meta(), "selfattn: ", name,
                     " must hold values for tables on device ", *device, "; got a tensor on meta");
    return device ? positions->to(*device) : *positions;
  }
  TORCH_CHECK_VALUE(*max_length >= 0, "selfattn: max_length must be at least 0; got ", *max_length);
  TORCH_CHECK_VALUE(*max_length <= kMostElements / (rotary_dim / 2), "selfattn: max_length must be at most ",
                    kMostElements / (rotary_dim / 2), " for tables of ", kMostElements, " elements; got ", *max_length);
  return at::arange(*max_length, at::TensorOptions().dtype(at::kLong).device(device.value_or(at::kCPU)));
}

void check_rotary_dim(int64_t rotary_dim, const char* name) {
  TORCH_CHECK_VALUE(rotary_dim > 0 && rotary_dim % 2 == 0, "selfattn: ", name, " must be positive and even; got ",
                    rotary_dim);
  TORCH_CHECK_VALUE(rotary_dim <= kMostFeatures, "selfattn: ", name, " must be at most ", kMostFeatures, "; got ",
                    rotary_dim);
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

at::Tensor rotate(const at::Tensor& x, const RotaryTables& tables, RotaryPairing pairing) {
  const at::Tensor heads = x.to(compute_dtype(x));
  const at::Tensor sin = tables.sin.to(heads.scalar_type()).unsqueeze(2);  // (1 or B, S, 1, R / 2)
  const at::Tensor cos = tables.cos.to(heads.scalar_type()).unsqueeze(2);
  const c10::SymInt dim = heads.sym_size(3), half = sin.sym_size(3), rotary_dim = half * 2;
  if (rotary_dim != dim) {
    const at::Tensor rotated = rotate(heads.narrow_symint(3, 0, rotary_dim), tables, pairing);
    return at::cat({rotated, heads.narrow_symint(3, rotary_dim, dim - rotary_dim)}, -1);
  }
  if (pairing == RotaryPairing::kInterleaved) {
    const at::Tensor even = heads.slice_symint(3, 0, std::nullopt, 2), odd = heads.slice_symint(3, 1, std::nullopt, 2);
    return at::stack({even * cos - odd * sin, even * sin + odd * cos}, -1).flatten(3, 4);
  }
  const at::Tensor low = heads.narrow_symint(3, 0, half), high = heads.narrow_symint(3, half, half);
  return at::cat({low * cos - high * sin, low * sin + high * cos}, -1);
}

}  // namespace selfattn
