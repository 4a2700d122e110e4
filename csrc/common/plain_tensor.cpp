#include "common/plain_tensor.h"

#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

namespace selfattn {

bool is_plain(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.unsafeGetTensorImpl()->is_python_dispatch() &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

bool is_autocast_on(const at::Tensor& tensor) {
  const auto device = tensor.device().type();
  return at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
}

}  // namespace selfattn
