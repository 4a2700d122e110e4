// Host side: which form of the backward pass a call takes, in which order its tiles, and where its scratch memory lies.
#pragma once
#include <algorithm>
#include <type_traits>

#include "config.cuh"
#include "flash/tile/constants.h"
#include "schedule.cuh"

namespace selfattn::cuda::sm90 {

constexpr int kTilesUnderWay = 256;
constexpr int kKeysForBackgroundWarps =
    768;  // that a query sees: else multiplying is too short to hide the background jobs

// How many keys a query sees on average, as far as the host knows: segments may be shorter.
inline int64_t keys_seen(const BackwardParams& p) {
  const int64_t length = p.shape.key_length, window = int64_t(p.window.left) + p.window.right + 1;
  const bool is_halved = window >= length && std::min(p.window.left, p.window.right) < length;
  return is_halved ? length / 2 : std::min(window, length);
}

// How many keys a query may see for the two-pass form to be the faster one: measured (docs/kernels/backward.md).
template <class Config>
constexpr int keys_of_two_pass() {
  return Config::kHeadDim == 128 ? 1024 : 768;
}
constexpr float kBlocksOverKeys = 1.25f;  // as seen by the segments kernel, which counts whole blocks

// Up to here the kernel up to D 128 may have logits with softcap: where lse is as large as an exact statistic
// (exceptional.cuh), for a sink's sake, there every P is 0. It has no registers for the care that others would want.
constexpr float kCapOfSinglePass = 512.f;

template <class Config>
BackwardForm choose_form(const BackwardParams& p) {
  if (Config::kIsD256) return BackwardForm::kSinglePass;
  if (p.is_deterministic || p.softcap > kCapOfSinglePass) return BackwardForm::kTwoPass;
  if (keys_seen(p) < keys_of_two_pass<Config>()) return BackwardForm::kTwoPass;  // segments only take keys away
  return p.segments.mode ? BackwardForm::kEither : BackwardForm::kSinglePass;
}

// How many batches the single-pass form takes in one launch. Where the two-pass form may have the work, memory for the
// accumulator of dQ would often lie idle, so it is kept small: one launch after another, each with enough tiles for all
// thread blocks.
template <class Config>
int batches_of_single_pass(const BackwardParams& p, BackwardForm form) {
  constexpr int kTilesOfLaunch = 1024;  // about eight for each thread block
  if (form == BackwardForm::kTwoPass) return 0;
  if (form == BackwardForm::kSinglePass) return p.shape.batch;
  const int64_t tiles = int64_t((p.shape.key_length + Config::kTileKv - 1) / Config::kTileKv) * p.shape.num_kv_heads;
  return int(std::min<int64_t>(p.shape.batch, (kTilesOfLaunch + tiles - 1) / tiles));
}

// The arrays of the workspace are laid out one behind the other; `end` is the first byte past them.
template <class Config>
BackwardSchedule make_backward_schedule(const BackwardParams& p, char** end) {
  const AttentionShape& shape = p.shape;
  BackwardSchedule schedule = {};
  schedule.query_tiles = (shape.query_length + Config::kTileQ - 1) / Config::kTileQ;
  schedule.key_tiles = (shape.key_length + Config::kTileKv - 1) / Config::kTileKv;
  schedule.dq_tile_rows = schedule.query_tiles * Config::kDqTileRowsPerTile;
  schedule.group_size = shape.num_heads / shape.num_kv_heads;
  schedule.kv_groups = shape.batch * shape.num_kv_heads;
  // Q, dO and the sum of dQ of a section stay in L2. Tiles of equal length need no more; of tiles cut by a causal limit
  // or by segments, more than there are thread blocks must be under way, or the long ones come too late.
  const bool has_equal_tiles = p.window.right == AttentionWindow::kUnbounded && p.segments.mode == nullptr;
  constexpr int64_t kBytesOfElement = 2 + 2 + 4;
  const int64_t kv_group_bytes = kBytesOfElement * Config::kHeadDim * shape.query_length * schedule.group_size;
  const int64_t by_bytes = ((has_equal_tiles ? 16 : 32) << 20) / kv_group_bytes;
  const int64_t by_tiles = has_equal_tiles ? 1 : (kTilesUnderWay + schedule.key_tiles - 1) / schedule.key_tiles;
  schedule.kv_groups_per_section = int(std::clamp<int64_t>(std::max(by_bytes, by_tiles), 1, schedule.kv_groups));
  schedule.sections = (schedule.kv_groups + schedule.kv_groups_per_section - 1) / schedule.kv_groups_per_section;
  schedule.walks_upward = schedule.group_size == 1;
  schedule.reverses = !schedule.walks_upward && p.window.right < AttentionWindow::kUnbounded && !p.segments.mode &&
                      !(Config::kIsD256 && p.is_deterministic);
  schedule.has_background_warps = Config::kHasBackgroundWarps && schedule.sections > 1 &&
                                  schedule.work_tiles() >= kTilesUnderWay && keys_seen(p) >= kKeysForBackgroundWarps;
  schedule.form = choose_form<Config>(p);
  const int64_t pairs_of_two_pass = int64_t(shape.batch) * shape.query_length * keys_of_two_pass<Config>();
  schedule.max_blocks_of_two_pass = int64_t(kBlocksOverKeys * pairs_of_two_pass) / (kQueryBlock * Config::kTileKv);
  schedule.batches_counted = shape.batch;
  schedule.logit_of_exponent = double(p.scale) / double(p.scale * kLog2E);
  schedule.softcap = Softcap::of(p.scale, p.softcap);
  schedule.query_blocks = (shape.query_length + kQueryBlock - 1) / kQueryBlock;
  schedule.stat_groups = (shape.query_length + kStatTile - 1) / kStatTile * (kStatTile / kStatRows);

  const int64_t heads = int64_t(shape.batch) * shape.num_heads;
  const int64_t heads_summed = int64_t(batches_of_single_pass<Config>(p, schedule.form)) * shape.num_heads;
  char* at = static_cast<char*>(p.workspace);
  const auto take = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::decay_t<decltype(array)>>(at);
    at += count * sizeof(*array);
  };
  take(schedule.dq_accumulator, heads_summed * schedule.dq_tile_rows * Config::kPanels * kDqTileFloats);
  take(schedule.row_stats, heads * schedule.stat_groups * kStatFloats);
  take(schedule.dq_semaphores, p.is_deterministic ? heads * schedule.query_tiles : 0);
  const int64_t two_pass_tiles =
      std::max<int64_t>(heads * (schedule.stat_groups * kStatRows / kStatTile), schedule.work_tiles());
  take(schedule.repair_list, schedule.form == BackwardForm::kSinglePass ? 0 : two_pass_tiles);
  take(schedule.counters, schedule.count_of_counters());
  *end = at;
  return schedule;
}

}  // namespace selfattn::cuda::sm90
