// The families of flash kernels: what each can do, and how it is called. Nothing above this file knows what a compute
// capability means for attention.
#pragma once
#include "common/kernel_limits.h"
#include "params.h"

namespace selfattn::cuda {

// Launches throw std::runtime_error if a tensor map cannot be made; otherwise they return the launch status. Tile sizes
// are for the preparation of the segments (segments/tables.h); of the params that they are asked with, shape,
// softcap and allows_tf32 are set.
struct FlashKernels {
  const char* name;
  int min_capability, max_capability;  // of the devices that it serves, 10 * major + minor
  bool is_of_float32;                  // and of nothing else; the others are of 16-bit elements
  bool is_of_unaligned;                // of 16-bit elements in rows that are RowLayout::kUnaligned, and of nothing else
  bool reads_pages;                    // whether launch_forward takes ForwardParams::pages
  KernelLimits limits;
  bool (*is_built_for)(int device);  // whether this build holds the family's kernels for a device

  TileSizes (*forward_tiles)(const ForwardParams& params);
  // out and lse from q, k, v.
  cudaError_t (*launch_forward)(const ForwardParams& params, cudaStream_t stream);

  // The backward pass wants the tables with the order of key tiles, and of query tiles of ordered_queries rows (0:
  // not).
  TileSizes (*backward_tiles)(const BackwardParams& params);
  int (*backward_ordered_queries)(const BackwardParams& params);
  // Scratch memory. Its contents before the call do not matter.
  int64_t (*backward_workspace_bytes)(const BackwardParams& params);
  // grad_q, grad_k, grad_v.
  cudaError_t (*launch_backward)(const BackwardParams& params, cudaStream_t stream);
};

constexpr int kNewest = 1 << 30;  // max_capability where there is no limit

// Every card since Ampere: mma.sync and cp.async.
const FlashKernels& sm80_kernels();
// Hopper: TMA and wgmma.
const FlashKernels& sm90_kernels();
// 16-bit elements in unaligned rows: kernels of the kind of sm80 for every card since Ampere, Hopper included.
const FlashKernels& unaligned_kernels();
// float32, which has kernels of its own for rows of either layout: every card since Ampere.
const FlashKernels& float32_kernels();

// The family that serves elements of a type in rows of a layout on a device of this compute capability (10 * major +
// minor); null where none does. The environment variable SELFATTN_FLASH_FAMILY (sm80, sm90) forces one where there are
// several, which is 16-bit elements in aligned rows. The devices of a process may differ.
const FlashKernels* select_kernels(int device, int capability, ElementType element, RowLayout layout);

}  // namespace selfattn::cuda
