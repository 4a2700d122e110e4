// The only file that calls LibTorch's brgemm, which is no stable interface.
#include "cpu/gemm.h"

#include <ATen/native/CPUBlas.h>

namespace selfattn::cpu {
namespace {

void bfloat16_brgemm(int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, const void* b, int64_t ldb, float* c,
                     int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, static_cast<const at::BFloat16*>(a),
                              static_cast<const at::BFloat16*>(b), c, /*is_vnni=*/true);
}

}  // namespace

PanelGemm bfloat16_matrix_unit() {
  // could_pack is true where brgemm runs on AMX. Elsewhere it is no faster than the kernels' own products.
  return at::native::cpublas::could_pack(at::kBFloat16) ? bfloat16_brgemm : nullptr;
}

void release_matrix_unit() { at::native::cpublas::brgemm_release(); }

}  // namespace selfattn::cpu
