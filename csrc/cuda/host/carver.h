// Scratch memory that several arrays share.
#pragma once
#include <cstdint>

namespace selfattn::cuda {

// Hands out 256-byte-aligned arrays one after the other.
struct Carver {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(base + used);
    used += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return array;
  }
};

}  // namespace selfattn::cuda
