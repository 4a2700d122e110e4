// Gradients of exact attention in float32: dQ, dK, dV of O = softmax(scale * Q K^T) V. Host side of one head dimension
// and precision: params -> schedules -> launches.
//
//   preprocess  the statistics of the rows of queries
//   dq          a thread block a query tile
//   dkdv        a thread block a key tile
//
// Every sum stays in registers and is added up in one order, so the gradients are bitwise equal from call to call.
#pragma once
#include "dkdv_kernel.cuh"
#include "dq_kernel.cuh"
#include "flash/tile/make_schedule.h"
#include "host/device.h"
#include "launcher.h"
#include "preprocess.cuh"
#include "workspace.h"

namespace selfattn::cuda::float32 {

// Tiles of heads that are worked on together: so many that what all of them read stays in L2, and, where the tiles
// differ in length, more of them at the end.
constexpr int64_t kTileSectionBytes = 4 << 20, kUnevenLastSectionBytes = 16 << 20;

// bytes_of_group: what is read by all tiles of `group` heads.
template <class Table>
TileSchedule make_tile_schedule(int heads, int group, int length, int64_t bytes_of_group, bool is_even) {
  const int tiles_per_head = (length + Table::kOrderedRows - 1) / Table::kOrderedRows * Table::kTilesTogether;
  return divide_into_sections(heads, group, tiles_per_head, bytes_of_group, kTileSectionBytes,
                              is_even ? kTileSectionBytes : kUnevenLastSectionBytes);
}

template <class Config, class Kernel>
cudaError_t launch_tiles(Kernel kernel, const BackwardKernelParams& p, int tiles, int device, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(typename Config::SharedStorage);
  if (const cudaError_t status = allow_shared_memory<Config>(kernel, kSharedBytes, device)) return status;
  kernel<<<tiles, Config::kThreads, kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

template <int kDim, Precision kPrecision, RowLayout kLayout>
cudaError_t BackwardLauncher<kDim, kPrecision, kLayout>::launch(const BackwardParams& params, cudaStream_t stream) {
  using Queries = DqConfig<kDim, kPrecision, kLayout>;
  using Keys = DkdvConfig<kDim, kPrecision, false, kLayout>;
  using CappedKeys = DkdvConfig<kDim, kPrecision, true, kLayout>;
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device)) return status;
  const AttentionShape& shape = params.shape;
  const int group = shape.num_heads / shape.num_kv_heads;
  const int64_t row_bytes = int64_t(sizeof(float)) * (shape.dim_qk + shape.dim_v);  // of K and V, and of Q and dO
  const bool is_even = !params.segments.mode && params.window.left == AttentionWindow::kUnbounded &&
                       params.window.right == AttentionWindow::kUnbounded;
  BackwardKernelParams p;
  p.call = params;
  p.of_queries = make_tile_schedule<typename Queries::Table>(shape.batch * shape.num_heads, group, shape.query_length,
                                                             row_bytes * shape.key_length, is_even);
  p.of_keys = make_tile_schedule<typename Keys::Table>(shape.batch * shape.num_kv_heads, 1, shape.key_length,
                                                       row_bytes * shape.query_length * group, is_even);
  p.lse = static_cast<float*>(params.workspace), p.delta = p.lse + stat_count(shape);
  p.stat_pitch = stat_pitch(shape);

  if (p.of_queries.tiles) {
    flash_attention_backward_preprocess_kernel<kPrecision, kLayout>
        <<<preprocess_blocks(p), kPreprocessThreads, 0, stream>>>(p);
    if (const cudaError_t status = cudaGetLastError()) return status;
    if (const cudaError_t status =
            launch_tiles<Queries>(flash_attention_backward_dq_kernel<Queries>, p, p.of_queries.tiles, device, stream))
      return status;
  }
  if (!p.of_keys.tiles) return cudaSuccess;
  if (params.softcap > 0.f)
    return launch_tiles<CappedKeys>(flash_attention_backward_dkdv_kernel<CappedKeys>, p, p.of_keys.tiles, device,
                                    stream);
  return launch_tiles<Keys>(flash_attention_backward_dkdv_kernel<Keys>, p, p.of_keys.tiles, device, stream);
}

}  // namespace selfattn::cuda::float32
