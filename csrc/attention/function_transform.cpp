#include "attention/function_transform.h"

#include <ATen/FuncTorchTLS.h>
#include <c10/util/Exception.h>

namespace selfattn {

bool is_function_transform_active() {
  // The header that tells the stack of transforms needs a JSON library; what every build of ATen offers is this check,
  // which throws where a C++ autograd function may not run: under any transform.
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (!transforms) return false;
  try {
    transforms->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    return true;
  }
  return false;
}

bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(0).defined(); }

}  // namespace selfattn
