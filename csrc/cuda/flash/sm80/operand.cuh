// Tiles of q, k and v in shared memory: panels of 64 columns, one after the other, each of 128-byte rows whose 16-byte
// chunks are swizzled (chunk c of row r at place c ^ r % 8), so that neither copies nor ldmatrix meet in a bank.
#pragma once
#include <type_traits>

#include "flash/params.h"
#include "flash/tile/constants.h"
#include "flash/tile/unaligned_chunk.cuh"
#include "ptx/address.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/matrix.cuh"

namespace selfattn::cuda::sm80 {

constexpr int kPanelColumns = 64, kPanelRowBytes = 128, kChunkElements = 8, kChunkBytes = 16;

// kLayout: of the rows in global memory that the tile is loaded from and stored to.
template <int kRows_, int kDim_, RowLayout kLayout_ = RowLayout::kAligned>
struct OperandTile {
  static constexpr int kRows = kRows_, kDim = kDim_;
  static constexpr RowLayout kLayout = kLayout_;
  static constexpr int kPanels = (kDim + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelBytes = kRows * kPanelRowBytes, kBytes = kPanels * kPanelBytes;
  static constexpr int kChunks = kDim / kChunkElements;  // of a row

  // Bytes from the start of the tile.
  static __device__ __forceinline__ int place(int row, int chunk) {
    return chunk / 8 * kPanelBytes + row * kPanelRowBytes + (chunk % 8 ^ row % 8) * kChunkBytes;
  }

  // What a thread knows beside: the bytes of its chunk that are before `dim`, 0 or fewer in a chunk past it. (Not cut
  // off at 0: ptxas 13.0 for 9.0 takes a wrong predicate from min and max in one instruction.)
  struct WholeChunk {};
  struct PartOfChunk {
    int bytes;
  };

  // Where a thread's copies come from, and go to: its chunk of a head's rows, g_head being the first, columns past
  // `dim` of which are zeros.
  template <int kThreads>
  struct Source : std::conditional_t<kLayout == RowLayout::kUnaligned, PartOfChunk, WholeChunk> {
    static constexpr int kLanesOfRow = kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32, kRowStep = kThreads / kLanesOfRow;
    static_assert(kRows % kRowStep == 0 && (kRowStep % 8 == 0 || kRowStep == 4));
    const uint16_t* g_chunk;  // of the thread's first row
    int64_t step;             // elements from one of its rows to the next
    int64_t stride_token;
    int first_place;
    int first_row;  // past all rows where the thread's columns are past dim

    __device__ __forceinline__ Source(const uint16_t* g_head, int64_t stride_token, int dim)
        : Source(stride_token, dim) {
      g_chunk = g_head + offset(stride_token, dim);
    }
    // Without the head, to which `offset` leads.
    __device__ __forceinline__ Source(int64_t stride_token, int dim)
        : step(kRowStep * stride_token), stride_token(stride_token) {
      const int chunk = threadIdx.x % kLanesOfRow, row = threadIdx.x / kLanesOfRow;
      first_place = place(row, chunk);
      first_row = chunk * kChunkElements < dim ? row : kPastAllRows;
      if constexpr (kLayout == RowLayout::kUnaligned)
        this->bytes = 2 * ::min(dim - chunk * kChunkElements, kChunkElements);
    }
    static __device__ __forceinline__ int64_t offset(int64_t stride_token, int dim) {
      const int column = threadIdx.x % kLanesOfRow * kChunkElements, row = threadIdx.x / kLanesOfRow;
      return row * stride_token + (column < dim ? column : 0);
    }
    // Of the thread's i-th row.
    __device__ __forceinline__ int place_of(int i) const {
      constexpr int kFlip = 4 * kChunkBytes;  // of the swizzle, where rows are 4 apart
      return (kRowStep % 8 == 0 || i % 2 == 0 ? first_place : first_place ^ kFlip) + i * kRowStep * kPanelRowBytes;
    }
    static constexpr int kPastAllRows = 1 << 30;
  };

  // Starts the copies of rows first_row .. of a head that has `rows`; zeros past them. All kThreads threads take part,
  // each with one chunk of every kRowStep-th row; nobody waits.
  template <int kThreads>
  static __device__ __forceinline__ void load(uint32_t s_tile, const Source<kThreads>& source, int first_row,
                                              int rows) {
    using From = Source<kThreads>;
    if (kChunks < From::kLanesOfRow && threadIdx.x % From::kLanesOfRow >= kChunks) return;
    const uint16_t* g_chunk = source.g_chunk + first_row * source.stride_token;
    const int rows_left = rows - first_row - source.first_row;
    constexpr int kCopies = kRows / From::kRowStep;
    if constexpr (kLayout == RowLayout::kUnaligned) {
      copy_unaligned<kCopies>(s_tile, source, g_chunk, rows_left);
    } else {
#pragma unroll
      for (int i = 0; i < kCopies; i++, g_chunk += source.step)
        ptx::copy_async(s_tile + source.place_of(i), g_chunk, i * From::kRowStep < rows_left);
    }
  }

  // The same of rows that lie in groups of kCachePageMultiple: group_start, of lane g, is where group g begins, in
  // elements from the source on, or negative: the group is all zeros. Rows from `rows` on are zeros, too.
  template <int kThreads>
  static __device__ __forceinline__ void load_groups(uint32_t s_tile, const Source<kThreads>& source,
                                                     int64_t group_start, int rows) {
    using From = Source<kThreads>;
    constexpr int kCopies = kCachePageMultiple / From::kRowStep;  // of a thread, in a group
    static_assert(kLayout == RowLayout::kAligned && kCopies >= 1 && kRows % kCachePageMultiple == 0);
#pragma unroll 1
    for (int group = 0; group < kRows / kCachePageMultiple; group++) {
      const int64_t start = __shfl_sync(~0u, group_start, group);
      if (kChunks < From::kLanesOfRow && threadIdx.x % From::kLanesOfRow >= kChunks) continue;
      const int rows_left = start < 0 ? 0 : rows - group * kCachePageMultiple - source.first_row;
      const uint16_t* g_chunk = source.g_chunk + ::max(start, int64_t(0));
#pragma unroll
      for (int i = 0; i < kCopies; i++, g_chunk += source.step)
        ptx::copy_async(s_tile + source.place_of(group * kCopies + i), g_chunk, i * From::kRowStep < rows_left);
    }
  }

  // A thread's rows are a multiple of 8 bytes apart, so that all of them are copied by the same pieces. Where these are
  // of 2 bytes, the thread waits for them: the copies go through its registers, kAtOnce rows at a time.
  template <int kCopies, class From>
  static __device__ __forceinline__ void copy_unaligned(uint32_t s_tile, const From& source, const uint16_t* g_chunk,
                                                        int rows_left) {
    static_assert(From::kRowStep * sizeof(uint16_t) % 8 == 0);
    const auto copy_pieces = [&](auto piece_bytes) {
#pragma unroll 1
      for (int i = 0; i < kCopies; i++, g_chunk += source.step)
        copy_chunk_async<piece_bytes>(s_tile + source.place_of(i), g_chunk,
                                      i * From::kRowStep < rows_left ? source.bytes : 0);
    };
    const auto copy_through_registers = [&](const auto& load_chunk) {
      constexpr int kAtOnce = 2;
      static_assert(kCopies % kAtOnce == 0);
#pragma unroll 1
      for (int first = 0; first < kCopies; first += kAtOnce) {
        uint4 chunks[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++, g_chunk += source.step)
          chunks[i] = (first + i) * From::kRowStep < rows_left ? load_chunk(g_chunk) : uint4{};
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) ptx::store_shared(s_tile + source.place_of(first + i), chunks[i]);
      }
    };
    if (has_pieces<8>(g_chunk, source.bytes))
      copy_pieces(std::integral_constant<int, 8>());
    else if (has_pieces<4>(g_chunk, source.bytes))
      copy_pieces(std::integral_constant<int, 4>());
    else if (source.bytes == kChunkBytes)
      copy_through_registers([](const uint16_t* g_chunk) { return load_odd_chunk(g_chunk); });
    else
      copy_through_registers(
          [&](const uint16_t* g_chunk) { return load_elements(g_chunk, source.bytes / int(sizeof(uint16_t))); });
  }

  // A chunk of the tile to a row of global memory that has `columns` columns left, one at least.
  static __device__ __forceinline__ void store_chunk(uint16_t* g_chunk, const unsigned char* s_chunk, int columns) {
    store_row_chunk<kLayout>(g_chunk, *reinterpret_cast<const uint4*>(s_chunk), columns);
  }

  // Operands of 16 columns, step after step: of a place in step 0 (below) that in another.
  static __device__ __forceinline__ uint32_t at_step(uint32_t s_place, int step) {
    return (s_place ^ step % 4 * (2 * kChunkBytes)) + step / 4 * kPanelBytes;
  }

  // As left operand: where this lane's row of 16 rows is, first_row being a multiple of 8.
  static __device__ __forceinline__ uint32_t left_place(uint32_t s_tile, int first_row) {
    const int lane = threadIdx.x % kWarpSize;
    return s_tile + place(first_row + lane % 16, lane / 16);
  }
  static __device__ __forceinline__ void load_left(uint32_t s_place, int step, uint32_t (&a)[4]) {
    ptx::load_matrix_x4(at_step(s_place, step), a);
  }

  // And back. stmatrix is of compute capability 9.0 and newer; before, each lane stores its four pairs.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static constexpr bool kHasMatrixStores = true;
#else
  static constexpr bool kHasMatrixStores = false;
#endif
  static __device__ __forceinline__ uint32_t store_place(uint32_t s_tile, int first_row) {
    const int lane = threadIdx.x % kWarpSize;
    return kHasMatrixStores ? left_place(s_tile, first_row) : s_tile + place(first_row + lane / 4, 0) + 4 * (lane % 4);
  }
  static __device__ __forceinline__ void store_left(uint32_t s_place, int step, const uint32_t* a) {
    const uint32_t s_step = at_step(s_place, step);
    if constexpr (kHasMatrixStores) {
      ptx::store_matrix_x4(s_step, a[0], a[1], a[2], a[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) ptx::store_pair((s_step ^ i / 2 * kChunkBytes) + i % 2 * 8 * kPanelRowBytes, a[i]);
    }
  }

  // As right operand with the tile's rows as columns (Q K^T): b[0], b[1] of rows 16 * pair .. + 7, b[2], b[3] of the
  // eight behind them; columns 16 * step .. + 15.
  static __device__ __forceinline__ uint32_t right_place(uint32_t s_tile) {
    const int lane = threadIdx.x % kWarpSize;
    return s_tile + place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }
  static __device__ __forceinline__ void load_right(uint32_t s_place, int pair, int step, uint32_t (&b)[4]) {
    ptx::load_matrix_x4(at_step(s_place, step) + pair * 16 * kPanelRowBytes, b);
  }

  // As right operand (P V): rows 16 * step .. + 15; b[0], b[1] of columns 16 * pair .. + 7, b[2], b[3] of the eight
  // behind them. From left_place(s_tile, 0).
  static __device__ __forceinline__ void load_right_transposed(uint32_t s_place, int step, int pair, uint32_t (&b)[4]) {
    ptx::load_matrix_x4_transposed(at_step(s_place, pair) + step * 16 * kPanelRowBytes, b);
  }
};

}  // namespace selfattn::cuda::sm80
