// Eight elements that lie side by side, as they come from memory and go back: 16 or 32 bytes.
#pragma once
#include "ptx/arithmetic.cuh"

namespace selfattn::cuda {

constexpr int kChunk = 8;  // elements

template <class Element>
struct Chunk {
  static constexpr int kVectors = kChunk * sizeof(Element) / sizeof(uint4);
  uint4 vectors[kVectors];
};

// Zeros where it is not there. Read once by the kernel: it need not stay in the L1 cache. Not a load of read-only data:
// the results may be written over the inputs.
__device__ __forceinline__ uint4 load_streaming(const uint4* g_source, bool is_there) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n"
      "mov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
      "@p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(g_source), "r"(static_cast<int>(is_there)));
  return v;
}

template <class Element>
__device__ __forceinline__ Chunk<Element> load_chunk(const Element* g_source, bool is_there) {
  Chunk<Element> chunk;
#pragma unroll
  for (int i = 0; i < Chunk<Element>::kVectors; i++) {
    chunk.vectors[i] = load_streaming(reinterpret_cast<const uint4*>(g_source) + i, is_there);
  }
  return chunk;
}

// Spelt out: left to itself the compiler cuts some of these stores into words.
template <class Element>
__device__ __forceinline__ void store_chunk(Element* g_destination, const Chunk<Element>& chunk) {
#pragma unroll
  for (int i = 0; i < Chunk<Element>::kVectors; i++) {
    const uint4 v = chunk.vectors[i];
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<uint4*>(g_destination) + i),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  }
}

__device__ __forceinline__ float2 unpack_word(uint32_t word, __nv_bfloat16) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

__device__ __forceinline__ float2 unpack_word(uint32_t word, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

template <class Element>
__device__ __forceinline__ void to_floats(const Chunk<Element>& chunk, float (&values)[kChunk]) {
#pragma unroll
  for (int i = 0; i < Chunk<Element>::kVectors; i++) {
    const uint4 v = chunk.vectors[i];
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if constexpr (sizeof(Element) == sizeof(float)) {
        values[4 * i + j] = __uint_as_float(words[j]);
      } else {
        const float2 two = unpack_word(words[j], Element());
        values[2 * j] = two.x;
        values[2 * j + 1] = two.y;
      }
    }
  }
}

template <class Element>
__device__ __forceinline__ Chunk<Element> from_floats(const float (&values)[kChunk]) {
  Chunk<Element> chunk;
#pragma unroll
  for (int i = 0; i < Chunk<Element>::kVectors; i++) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if constexpr (sizeof(Element) == sizeof(float)) {
        words[j] = __float_as_uint(values[4 * i + j]);
      } else {
        words[j] = ptx::pack<Element>(values[2 * j], values[2 * j + 1]);
      }
    }
    chunk.vectors[i] = make_uint4(words[0], words[1], words[2], words[3]);
  }
  return chunk;
}

}  // namespace selfattn::cuda
