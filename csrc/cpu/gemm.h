#pragma once

#include "cpu/flash_kernels.h"

namespace selfattn::cpu {

/// The matrix unit of the CPU (AMX) for bfloat16, through LibTorch; null where there is none.
PanelGemm bfloat16_matrix_unit();

/// Gives the matrix unit back; for each thread that used it, at the end of its work.
void release_matrix_unit();

}  // namespace selfattn::cpu
