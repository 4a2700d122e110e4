// The slots of a call's tokens in their rows of a KV cache, as the binding gives them to the launcher.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "divisor.h"
#include "integer_view.h"

namespace selfattn::cuda {

// Tokens are counted through all batch rows: kMostTokens of them at most, and rows of the cache.
struct PositionsParams {
  int rows;                 // of the cache; without ids the batch rows
  int tokens;               // batch * columns
  int columns;              // tokens of a batch row
  Divisor by_columns;       // where there are tokens
  int64_t capacity;         // slots of a row, -1 at least and what the type of lengths holds at most
  IntegerView lengths;      // (rows, 1) slots in use: without these tokens where lengths_after is there, else with them
  IntegerView segment_ids;  // (batch, columns) the row of a token, negative: none; null: row b of batch b
  IntegerView given;        // (batch, columns) the slots, or null: the last ones of each row
  void* lengths_after;      // (rows) of the type of lengths, contiguous, or null
  int64_t* positions;       // (batch, columns) contiguous
};

constexpr int64_t kMostTokens = int64_t{1} << 30;

// Whether this build holds the kernels for the device.
bool kv_cache_positions_run_on(int device);

// One launch, which fills positions, and lengths_after where it is there. Values out of range stop the device.
cudaError_t launch_kv_cache_positions(const PositionsParams& params, cudaStream_t stream);

}  // namespace selfattn::cuda
