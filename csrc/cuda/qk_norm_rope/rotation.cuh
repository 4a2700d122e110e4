// Sines and cosines of a token's pairs, from tables or from its position.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

namespace selfattn::cuda {

__device__ __forceinline__ float load_float(const void* g_data, FloatType type, int64_t index) {
  switch (type) {
    case FloatType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(g_data)[index]);
    case FloatType::kHalf:
      return __half2float(static_cast<const __half*>(g_data)[index]);
    default:
      return static_cast<const float*>(g_data)[index];
  }
}

__device__ __forceinline__ void store_float(void* g_data, FloatType type, int64_t index, float value) {
  switch (type) {
    case FloatType::kBFloat16:
      static_cast<__nv_bfloat16*>(g_data)[index] = __float2bfloat16_rn(value);
      break;
    case FloatType::kHalf:
      static_cast<__half*>(g_data)[index] = __float2half_rn(value);
      break;
    default:
      static_cast<float*>(g_data)[index] = value;
  }
}

struct Rotation {
  float sin, cos;
};

// By an angle in quarter turns (rotary.h). Reduced to at most pi / 4 in float64, where far positions keep their digits;
// the polynomials (Cephes) are within 1 ulp of float32 there.
__device__ __forceinline__ Rotation rotation_of(double quarter_turns) {
  constexpr double kRoundToInteger = 6755399441055744.0;  // 1.5 * 2^52: the sum's last bits are the integer
  constexpr double kHalfPi = 1.57079632679489661923;
  const double shifted = quarter_turns + kRoundToInteger;
  const int quadrant = __double2loint(shifted);
  const float x = static_cast<float>((quarter_turns - (shifted - kRoundToInteger)) * kHalfPi);
  const float z = x * x;
  const float s = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
  const float c =
      1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  const float sin = quadrant & 1 ? c : s, cos = quadrant & 1 ? s : c;
  return {quadrant & 2 ? -sin : sin, (quadrant + 1) & 2 ? -cos : cos};
}

__device__ __forceinline__ double position_of(const AngleSource& source, int batch, int token) {
  if (!source.positions) return token;
  const int64_t index = batch * source.position_stride_batch + token * source.position_stride_token;
  switch (source.position_type) {
    case PositionType::kInt32:
      return static_cast<const int32_t*>(source.positions)[index];
    case PositionType::kInt64:
      return static_cast<double>(static_cast<const int64_t*>(source.positions)[index]);
    default:
      return static_cast<const double*>(source.positions)[index];
  }
}

__device__ __forceinline__ Rotation table_rotation(const AngleSource& source, int batch, int token, int pair) {
  const int64_t index = batch * source.table_stride_batch + token * source.table_stride_token +
                        static_cast<int64_t>(pair) * source.table_stride_pair;
  return {load_float(source.sin, source.table_type, index), load_float(source.cos, source.table_type, index)};
}

}  // namespace selfattn::cuda
