// apply_rotary_emb: qk_norm_rope without the norm.
#include <torch/library.h>

#include "rotary/norm_rope.h"

namespace selfattn {
namespace {

NormRopeHeads rotate_heads(const at::Tensor& xq, const at::Tensor& xk, const OptionalTensor& freqs_sin,
                           const OptionalTensor& freqs_cos, double theta, c10::string_view pairing) {
  NormRopeCall call{xq, xk};
  call.freqs_sin = freqs_sin;
  call.freqs_cos = freqs_cos;
  call.norm = false;
  call.theta = theta;
  call.pairing = parse_pairing(pairing, "pairing");
  validate(call, {.q = "xq", .k = "xk"});
  return qk_norm_rope(call);
}

}  // namespace
}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CompositeImplicitAutograd, m) {
  using namespace selfattn;
  m.impl("apply_rotary_emb", TORCH_FN(rotate_heads));
}
