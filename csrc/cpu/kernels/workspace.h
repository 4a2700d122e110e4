#pragma once

#include "cpu/flash_kernels.h"

namespace selfattn::cpu {
inline namespace CPU_CAPABILITY {

/// Hands out pieces of a thread's workspace. With a null base it only counts them.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <typename E>
  E* take(int64_t count) {
    char* piece = base_ ? base_ + bytes_ : nullptr;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(E)), 64);
    return reinterpret_cast<E*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace selfattn::cpu
