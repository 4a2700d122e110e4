// Tiles of q, k, v and the like in shared memory: panels of 32 columns, one after the other, each of 128-byte rows
// whose 16-byte chunks are swizzled (chunk c of row r at place c ^ r % 8). Copies, ldmatrix and the loads of rows of a
// right operand meet in no bank.
#pragma once
#include <type_traits>

#include "flash/params.h"
#include "flash/tile/constants.h"
#include "flash/tile/unaligned_chunk.cuh"
#include "precision.cuh"
#include "ptx/address.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/matrix.cuh"
#include "ptx/register.cuh"

namespace selfattn::cuda::float32 {

constexpr int kPanelColumns = 32, kPanelRowBytes = 128, kChunkElements = 4, kChunkBytes = 16;
constexpr int kProductRows = 16, kProductStep = 8;  // of an instruction: rows of the left operand, summed elements
constexpr int kMaxSharedBytes = 99 * 1024;          // that a thread block may have on every card from 8.0 on

__device__ __forceinline__ float* head_of(const TensorView& view, int batch, int head) {
  return static_cast<float*>(view.data) + batch * view.stride_batch + head * view.stride_head;
}

// kLayout: of the rows in global memory that the tile is loaded from.
template <int kRows_, int kDim_, RowLayout kLayout = RowLayout::kAligned>
struct FloatTile {
  static constexpr int kRows = kRows_, kDim = kDim_;
  static constexpr int kPanels = kDim / kPanelColumns, kPanelBytes = kRows * kPanelRowBytes,
                       kBytes = kPanels * kPanelBytes;
  static constexpr int kChunks = kDim / kChunkElements;  // of a row
  static_assert(kDim % kPanelColumns == 0 && kRows % 8 == 0);

  // Bytes from the start of the tile.
  static __device__ __forceinline__ int place(int row, int chunk) {
    return chunk / 8 * kPanelBytes + row * kPanelRowBytes + (chunk % 8 ^ row % 8) * kChunkBytes;
  }
  static __device__ __forceinline__ float& element(unsigned char* s_tile, int row, int column) {
    return *reinterpret_cast<float*>(s_tile + place(row, column / kChunkElements) + column % kChunkElements * 4);
  }

  // Every thread of kThreads has one chunk of every kRowStep-th row.
  template <int kThreads>
  struct OfThread {
    static constexpr int kRowStep = kThreads / kChunks, kCopies = kRows / kRowStep;
    static_assert(kThreads % kChunks == 0 && kRows % kRowStep == 0);
    const int thread = ptx::forget(static_cast<int>(threadIdx.x));  // or addresses stay in registers between the copies
    const int chunk = thread % kChunks, row = thread / kChunks;
    __device__ __forceinline__ int place(int i) const { return FloatTile::place(row + i * kRowStep, chunk); }
  };

  // Rows first_row .. of a head, g_head being its first; zeros past `rows` and in columns past `dim`. All threads take
  // part; nobody waits.
  template <int kThreads>
  static __device__ __forceinline__ void load(uint32_t s_tile, const float* g_head, int64_t stride_token, int first_row,
                                              int rows, int dim) {
    using Own = OfThread<kThreads>;
    const Own own;
    const bool is_column = own.chunk * kChunkElements < dim;
    const float* g_chunk = g_head + (first_row + own.row) * stride_token + (is_column ? own.chunk * kChunkElements : 0);
    if constexpr (kLayout == RowLayout::kUnaligned) {
      // A thread's rows are a multiple of 8 bytes apart, so that all of them are copied by the same pieces.
      static_assert(Own::kRowStep * sizeof(float) % 8 == 0);
      const int bytes = 4 * ::max(::min(dim - own.chunk * kChunkElements, kChunkElements), 0);
      const auto copy_pieces = [&](auto piece_bytes) {
#pragma unroll 1
        for (int i = 0; i < Own::kCopies; i++, g_chunk += Own::kRowStep * stride_token)
          copy_chunk_async<piece_bytes>(s_tile + own.place(i), g_chunk,
                                        first_row + own.row + i * Own::kRowStep < rows ? bytes : 0);
      };
      if (has_pieces<8>(g_chunk, bytes))
        copy_pieces(std::integral_constant<int, 8>());
      else
        copy_pieces(std::integral_constant<int, 4>());
    } else {
#pragma unroll
      for (int i = 0; i < Own::kCopies; i++) {
        const bool is_there = is_column && first_row + own.row + i * Own::kRowStep < rows;
        ptx::copy_async(s_tile + own.place(i), is_there ? g_chunk : g_head, is_there);
        g_chunk += Own::kRowStep * stride_token;
      }
    }
  }

  // Where operands are rounded: each thread rounds what it has copied, behind its wait and before the barrier.
  template <Precision kPrecision, int kThreads>
  static __device__ __forceinline__ void prepare_left(unsigned char* s_tile) {
    if constexpr (kPrecision == Precision::kTf32) {
      using Own = OfThread<kThreads>;
      const Own own;
#pragma unroll 4
      for (int i = 0; i < Own::kCopies; i++) {
        float4& s_chunk = *reinterpret_cast<float4*>(s_tile + own.place(i));
        const auto rounded = [](float x) { return is_exceptional(x) ? x : round_to_tf32(x); };
        const float4 chunk = s_chunk;
        s_chunk = {rounded(chunk.x), rounded(chunk.y), rounded(chunk.z), rounded(chunk.w)};
      }
    }
  }

  // As left operand: where this lane's row of 16 rows is, first_row being a multiple of 8; columns 8 * step .. + 7.
  static __device__ __forceinline__ uint32_t left_place(uint32_t s_tile, int first_row) {
    const int lane = threadIdx.x % kWarpSize;
    return s_tile + place(first_row + lane % 16, lane / 16);
  }
  static __device__ __forceinline__ void load_left(uint32_t s_place, int step, uint32_t* a) {
    ptx::load_matrix_x4((s_place ^ step % 4 * (2 * kChunkBytes)) + step / 4 * kPanelBytes, a);
  }

  // As right operand with the tile's rows as columns (Q K^T): rows 8 * group .. + 7; b[0], b[1] of columns 16 * pair ..
  // + 7, b[2], b[3] of the eight behind them.
  static __device__ __forceinline__ uint32_t right_place(uint32_t s_tile) {
    const int lane = threadIdx.x % kWarpSize;
    return s_tile + place(lane % 8, lane / 8);
  }
  static __device__ __forceinline__ void load_right(uint32_t s_place, int group, int pair, uint32_t* b) {
    ptx::load_matrix_x4((s_place ^ pair % 2 * (4 * kChunkBytes)) + pair / 2 * kPanelBytes + group * 8 * kPanelRowBytes,
                        b);
  }

  // As right operand (P V): rows 8 * step + 2t and + 1 with t = lane % 4, of chunk lane / 4 of a panel. So the summed
  // index is in the order in which accumulators hold it as a left operand, and the columns are in the order that
  // RowSums (products.cuh) undoes.
  static __device__ __forceinline__ int rows_place() {
    const int lane = threadIdx.x % kWarpSize;
    return place(lane % 4 * 2, lane / 4);
  }
  static __device__ __forceinline__ void load_rows(const unsigned char* s_tile, int rows_place, int step, int panel,
                                                   float4 (&rows)[2]) {
    const unsigned char* s_panel = s_tile + panel * kPanelBytes + step * kProductStep * kPanelRowBytes;
    rows[0] = *reinterpret_cast<const float4*>(s_panel + rows_place);
    rows[1] = *reinterpret_cast<const float4*>(s_panel + (rows_place ^ kChunkBytes) + kPanelRowBytes);
  }
};

}  // namespace selfattn::cuda::float32
