#pragma once

namespace selfattn {

/// Whether a torch.func transform (vmap, grad, jvp, ...) is active on this thread.
bool is_function_transform_active();

}  // namespace selfattn
