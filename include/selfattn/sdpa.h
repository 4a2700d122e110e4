#pragma once

#include <memory>

#include <c10/core/DispatchKey.h>
#include <selfattn/export.h>

namespace selfattn {

namespace sdpa {
class Registration;
}

/// selfattn's kernels behind PyTorch's flash attention operators, for as long as the object lives:
///
///     selfattn::SdpaOverride active;
///
/// From then on at::scaled_dot_product_attention runs selfattn's kernels wherever it chooses its flash backend. The
/// operators are those that torch.nn.attention's registry of implementations replaces: _flash_attention_forward,
/// _flash_attention_backward, _scaled_dot_product_flash_attention and its backward. What selfattn cannot serve goes to
/// the kernels of before, inside the same call. docs/integrations.md says which calls arrive, and which are served.
///
/// The registration is the process's: it holds for all threads, and no other thread may call attention while an object
/// is made or destroyed. Objects may live at once and end in any order; the newest serves, and what it cannot serve
/// goes past the others to the kernels of before. Where those are another library's, put there while the process ran,
/// they must outlive the object: once they are gone, a call that would reach them raises.
class SELFATTN_API SdpaOverride {
 public:
  /// `dispatch_key`: that of the kernels to replace; another than CUDA is for tests. Throws c10::NotImplementedError,
  /// and changes nothing, where PyTorch has no such kernels (as without CUDA), or operators with other arguments.
  [[nodiscard]] explicit SdpaOverride(c10::DispatchKey dispatch_key = c10::DispatchKey::CUDA);
  /// Takes the registration over.
  SdpaOverride(SdpaOverride&&) noexcept;
  /// Restores its own kernels of before, and takes the registration over.
  SdpaOverride& operator=(SdpaOverride&&) noexcept;
  /// Restores the kernels of before.
  ~SdpaOverride();

 private:
  std::unique_ptr<sdpa::Registration> registration_;
};

}  // namespace selfattn
