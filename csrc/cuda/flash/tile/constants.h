// What every kernel here counts with.
#pragma once

namespace selfattn::cuda {

constexpr int kWarpSize = 32;
constexpr float kLog2E = 1.4426950408889634f;  // log2(e)

}  // namespace selfattn::cuda
