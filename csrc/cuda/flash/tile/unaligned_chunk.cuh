// Chunks of 16 bytes of rows that may begin at any element (RowLayout::kUnaligned), between global memory and
// registers or shared memory, by the largest pieces of 8, 4 or 2 bytes that the address and the elements allow. Nothing
// outside of the row is read or written: other heads, and other people's memory, begin right behind it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "flash/params.h"
#include "ptx/async_copy.cuh"

namespace selfattn::cuda {

// Whether a chunk, the first `bytes` bytes of which are in the row, consists of pieces of so many bytes.
template <int kPieceBytes>
__device__ __forceinline__ bool has_pieces(const void* g_chunk, int bytes) {
  return ((static_cast<uint32_t>(reinterpret_cast<uintptr_t>(g_chunk)) | bytes) & (kPieceBytes - 1)) == 0;
}

// Starts the copies of a chunk that has_pieces, to shared memory; zeros behind its first `bytes` bytes.
template <int kPieceBytes>
__device__ __forceinline__ void copy_chunk_async(uint32_t s_chunk, const void* g_chunk, int bytes) {
#pragma unroll
  for (int at = 0; at < kRowChunkBytes; at += kPieceBytes)
    ptx::copy_piece_async<kPieceBytes>(s_chunk + at, static_cast<const char*>(g_chunk) + at, at < bytes);
}

// Chunks of 16-bit elements.

constexpr int kChunkElements16 = 8;

// The eight elements of a chunk that begins between two pairs of the memory.
__device__ __forceinline__ uint4 load_odd_chunk(const uint16_t* g_chunk) {
  const auto* pairs = reinterpret_cast<const uint32_t*>(g_chunk + 1);
  const uint32_t first = g_chunk[0], a = pairs[0], b = pairs[1], c = pairs[2], last = g_chunk[7];
  return {first | a << 16, a >> 16 | b << 16, b >> 16 | c << 16, c >> 16 | last << 16};
}

// The first `count` elements (8 or fewer), one by one, and zeros.
__device__ __forceinline__ uint4 load_elements(const uint16_t* g_chunk, int count) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t low = 2 * i < count ? g_chunk[2 * i] : 0, high = 2 * i + 1 < count ? g_chunk[2 * i + 1] : 0;
    pairs[i] = low | high << 16;
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// The first `count` elements of a chunk (8 if it has more, none if not even one), and zeros. (count is not cut off at
// 0: ptxas 13.0 for 9.0 takes a wrong predicate from min and max in one instruction.)
__device__ __forceinline__ uint4 load_chunk(const uint16_t* g_chunk, int count) {
  count = count < kChunkElements16 ? count : kChunkElements16;
  if (has_pieces<4>(g_chunk, 2 * count)) {
    const auto* pairs = reinterpret_cast<const uint32_t*>(g_chunk);
    return {count > 0 ? pairs[0] : 0, count > 2 ? pairs[1] : 0, count > 4 ? pairs[2] : 0, count > 6 ? pairs[3] : 0};
  }
  return count == kChunkElements16 ? load_odd_chunk(g_chunk) : load_elements(g_chunk, count);
}

// The first `count` elements of a chunk (8 if it has more).
__device__ __forceinline__ void store_chunk(uint16_t* g_chunk, const uint4& chunk, int count) {
  count = count < kChunkElements16 ? count : kChunkElements16;
  const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  if (has_pieces<8>(g_chunk, 2 * count)) {
    auto* quads = reinterpret_cast<uint2*>(g_chunk);
    quads[0] = {chunk.x, chunk.y};
    if (count > 4) quads[1] = {chunk.z, chunk.w};
  } else if (has_pieces<4>(g_chunk, 2 * count)) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (2 * i < count) reinterpret_cast<uint32_t*>(g_chunk)[i] = pairs[i];
  } else {
#pragma unroll
    for (int i = 0; i < kChunkElements16; i++)
      if (i < count) g_chunk[i] = static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16);
  }
}

// Chunks of float32.

constexpr int kChunkElements32 = 4;

// The first `count` elements of a chunk (4 if it has more), and zeros.
__device__ __forceinline__ float4 load_chunk(const float* g_chunk, int count) {
  return {count > 0 ? g_chunk[0] : 0.f, count > 1 ? g_chunk[1] : 0.f, count > 2 ? g_chunk[2] : 0.f,
          count > 3 ? g_chunk[3] : 0.f};
}

// The first `count` elements of a chunk (4 if it has more).
__device__ __forceinline__ void store_chunk(float* g_chunk, const float4& chunk, int count) {
  if (has_pieces<8>(g_chunk, 0) && count >= kChunkElements32) {
    auto* pairs = reinterpret_cast<float2*>(g_chunk);
    pairs[0] = {chunk.x, chunk.y}, pairs[1] = {chunk.z, chunk.w};
    return;
  }
  if (count > 0) g_chunk[0] = chunk.x;
  if (count > 1) g_chunk[1] = chunk.y;
  if (count > 2) g_chunk[2] = chunk.z;
  if (count > 3) g_chunk[3] = chunk.w;
}

// Chunks of rows of either layout, which have `columns` columns left, one at least. Chunk: uint4 of 16-bit elements,
// float4 of float32.

template <RowLayout kLayout, class Chunk, class Element>
__device__ __forceinline__ Chunk load_row_chunk(const Element* g_chunk, int columns) {
  if constexpr (kLayout == RowLayout::kUnaligned)
    return load_chunk(g_chunk, columns);
  else
    return *reinterpret_cast<const Chunk*>(g_chunk);
}

template <RowLayout kLayout, class Chunk, class Element>
__device__ __forceinline__ void store_row_chunk(Element* g_chunk, const Chunk& chunk, int columns) {
  if constexpr (kLayout == RowLayout::kUnaligned)
    store_chunk(g_chunk, chunk, columns);
  else
    *reinterpret_cast<Chunk*>(g_chunk) = chunk;
}

}  // namespace selfattn::cuda
