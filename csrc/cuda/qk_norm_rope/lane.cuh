// What one lane of a vector kernel holds: 16 elements of a head, 8 of its lower and 8 of its upper half, as 8 pairs. So
// both pairings are one code but for the order in which elements become pairs, and every load is 16 bytes wide.
#pragma once
#include "chunk.cuh"
#include "rotation.cuh"

namespace selfattn::cuda {

constexpr int kWarpSize = 32, kVectorThreads = kVectorWarps * kWarpSize;
constexpr int kLaneElements = 2 * kChunk;  // dim / kLaneElements lanes hold a head
constexpr int kLanePairs = kChunk;

// kLanes: lanes per head, a power of two; those past dim / kLaneElements hold zeros.
template <class Element_, int kLanes_, bool kPairsHalves_>
struct NormRopeConfig {
  using Element = Element_;
  static constexpr int kLanes = kLanes_;
  static constexpr bool kPairsHalves = kPairsHalves_;
  static constexpr int kRows = kWarpSize / kLanes;  // heads side by side in a warp
  static constexpr int kMaxDim = kLanes * kLaneElements;
  // Made by a lane when a warp makes them together.
  static constexpr int kRotationsPerLane = (kMaxDim / 2 + kWarpSize - 1) / kWarpSize;
  static constexpr int kMinBlocks = 2;  // per SM; bounds the registers
  // 16 registers of loads in flight for each tensor that is read, twice that where there is one
  static constexpr int kForwardPasses = sizeof(Element) == 2 ? 4 : 2, kBackwardPasses = kForwardPasses / 2;
};

struct Pairs {
  float first[kLanePairs], second[kLanePairs];
};

template <class Element>
struct RawPairs {
  Chunk<Element> low, high;
};

template <bool kPairsHalves>
__device__ __forceinline__ Pairs to_pairs(const float (&low)[kChunk], const float (&high)[kChunk]) {
  Pairs pairs;
#pragma unroll
  for (int i = 0; i < kLanePairs; i++) {
    if constexpr (kPairsHalves) {
      pairs.first[i] = low[i];
      pairs.second[i] = high[i];
    } else {
      const int j = 2 * i % kChunk;
      pairs.first[i] = i < kLanePairs / 2 ? low[j] : high[j];
      pairs.second[i] = i < kLanePairs / 2 ? low[j + 1] : high[j + 1];
    }
  }
  return pairs;
}

template <bool kPairsHalves>
__device__ __forceinline__ void from_pairs(const Pairs& pairs, float (&low)[kChunk], float (&high)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kLanePairs; i++) {
    if constexpr (kPairsHalves) {
      low[i] = pairs.first[i];
      high[i] = pairs.second[i];
    } else {
      const int j = 2 * i % kChunk;
      (i < kLanePairs / 2 ? low[j] : high[j]) = pairs.first[i];
      (i < kLanePairs / 2 ? low[j + 1] : high[j + 1]) = pairs.second[i];
    }
  }
}

// A lane's place: its head among those of the warp's pass, and its elements of it.
template <class Config>
struct LanePlace {
  using Element = typename Config::Element;
  int row, column, low, high;  // low, high: where its two chunks begin
  bool is_active;

  __device__ __forceinline__ LanePlace(int lane, int dim) {
    column = lane % Config::kLanes;
    row = lane / Config::kLanes;
    low = kChunk * column;
    high = dim / 2 + low;
    is_active = column * kLaneElements < dim;
  }

  __device__ __forceinline__ RawPairs<Element> load(const Element* g_head, bool is_there) const {
    return {load_chunk(g_head + low, is_there), load_chunk(g_head + high, is_there)};
  }

  __device__ __forceinline__ static Pairs unpack(const RawPairs<Element>& raw) {
    float lows[kChunk], highs[kChunk];
    to_floats(raw.low, lows);
    to_floats(raw.high, highs);
    return to_pairs<Config::kPairsHalves>(lows, highs);
  }

  __device__ __forceinline__ void store(Element* g_head, const Pairs& pairs) const {
    float lows[kChunk], highs[kChunk];
    from_pairs<Config::kPairsHalves>(pairs, lows, highs);
    store_chunk(g_head + low, from_floats<Element>(lows));
    store_chunk(g_head + high, from_floats<Element>(highs));
  }
};

__device__ __forceinline__ void read_four(const float* s_source, float* r_values) {
  const float4 four = *reinterpret_cast<const float4*>(s_source);
  r_values[0] = four.x, r_values[1] = four.y, r_values[2] = four.z, r_values[3] = four.w;
}

// The weight in the order in which lanes read it, four pairs' elements at once, without bank conflicts.
template <class Config>
struct SharedWeight {
  static constexpr int kLanes = Config::kLanes, kFour = 4, kRowOfLanes = kFour * kLanes;
  float values[Config::kMaxDim];  // [first of pairs 0..3 | 4..7, second of pairs 0..3 | 4..7][lane][4]

  // All threads of the block; a barrier must follow.
  __device__ __forceinline__ void fill(const NormRopeSide& side, int dim) {
    for (int i = threadIdx.x; i < Config::kMaxDim; i += kVectorThreads) {
      const int column = i / kFour % kLanes, pair = i / kRowOfLanes % 2 * kFour + i % kFour;
      const int is_second = i / (2 * kRowOfLanes), low = kChunk * column, high = dim / 2 + low;
      const int element = Config::kPairsHalves ? (is_second ? high : low) + pair
                          : pair < kFour       ? low + 2 * pair + is_second
                                               : high + 2 * (pair - kFour) + is_second;
      const bool is_there = side.weight && column * kLaneElements < dim;
      values[i] = is_there ? load_float(side.weight, side.weight_type, element) : 1.0f;
    }
  }

  __device__ __forceinline__ Pairs of_lane(int column) const {
    Pairs weight;
    read_four(values + kFour * column, &weight.first[0]);
    read_four(values + kFour * column + kRowOfLanes, &weight.first[4]);
    read_four(values + kFour * column + 2 * kRowOfLanes, &weight.second[0]);
    read_four(values + kFour * column + 3 * kRowOfLanes, &weight.second[4]);
    return weight;
  }
};

// first: sines, second: cosines of a lane's pairs.
template <class Config>
struct LaneRotations {
  static constexpr int kCosines = Config::kMaxDim / 2;
  const NormRopeParams& p;
  const AngleSource& source;
  float* s_rotations;  // the warp's: sines (kMaxDim / 2), cosines
  int lane;
  double step[Config::kRotationsPerLane];  // quarter turns of one step of the position, for the pairs it makes

  __device__ __forceinline__ LaneRotations(const NormRopeParams& p, const AngleSource& source, float* s_rotations,
                                           int lane)
      : p(p), source(source), s_rotations(s_rotations), lane(lane) {
#pragma unroll
    for (int i = 0; i < Config::kRotationsPerLane; i++) {
      const int pair = lane + i * kWarpSize;
      step[i] = pair < p.dim / 2 ? p.quarter_turns[pair] : 0.0;
    }
  }

  // The warp makes each rotation of a token once and shares them through its shared memory.
  __device__ __forceinline__ void make(int batch, int token) const {
    const double position = source.sin ? 0.0 : position_of(source, batch, token);
    __syncwarp();  // the token before is done with its own
#pragma unroll
    for (int i = 0; i < Config::kRotationsPerLane; i++) {
      const int pair = lane + i * kWarpSize;
      if (pair < p.dim / 2) {
        const Rotation rotation =
            source.sin ? table_rotation(source, batch, token, pair) : rotation_of(position * step[i]);
        s_rotations[pair] = p.rotates_back ? -rotation.sin : rotation.sin;
        s_rotations[kCosines + pair] = rotation.cos;
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ Pairs of_lane(const LanePlace<Config>& place) const {
    // Halves: pairs low .. low + 7. Interleaved: four pairs that begin at element low, four at element high.
    const int first = Config::kPairsHalves ? place.low : place.low / 2;
    const int last = Config::kPairsHalves ? place.low + kChunk / 2 : place.high / 2;
    Pairs rotations = {};
    if (place.is_active) {
      read_four(s_rotations + first, &rotations.first[0]);
      read_four(s_rotations + last, &rotations.first[4]);
      read_four(s_rotations + kCosines + first, &rotations.second[0]);
      read_four(s_rotations + kCosines + last, &rotations.second[4]);
    }
    return rotations;
  }
};

// Rotates the pairs by the angles; backwards with kBack.
template <bool kBack>
__device__ __forceinline__ void rotate(Pairs& x, const Pairs& rotations) {
#pragma unroll
  for (int i = 0; i < kLanePairs; i++) {
    const float first = x.first[i], second = x.second[i];
    const float sin = kBack ? -rotations.first[i] : rotations.first[i], cos = rotations.second[i];
    x.first[i] = first * cos - second * sin;
    x.second[i] = first * sin + second * cos;
  }
}

// Sum over the kLanes lanes of a head, the same in each of them.
template <int kLanes>
__device__ __forceinline__ float sum_of_head(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

__device__ __forceinline__ float dot(const Pairs& a, const Pairs& b) {
  float of_first = 0.0f, of_second = 0.0f;
#pragma unroll
  for (int i = 0; i < kLanePairs; i++) {
    of_first += a.first[i] * b.first[i];
    of_second += a.second[i] * b.second[i];
  }
  return of_first + of_second;
}

// The tokens of a warp: every kVectorWarps-th of its block's range.
struct WarpTokens {
  const NormRopeSide& side;
  int index, last, batch = 0, token = 0;

  __device__ __forceinline__ WarpTokens(const NormRopeParams& p, const NormRopeSide& side, int block) : side(side) {
    const int64_t first = static_cast<int64_t>(block) * kVectorWarps * p.tokens_per_warp;
    const int64_t end = first + kVectorWarps * p.tokens_per_warp,
                  tokens = static_cast<int64_t>(side.batch) * side.length;
    index = static_cast<int>(first) + static_cast<int>(threadIdx.x) / kWarpSize;
    last = static_cast<int>(end < tokens ? end : tokens);
  }

  // Whether there is one more.
  __device__ __forceinline__ bool find() {
    if (index >= last) return false;
    batch = index / side.length;
    token = index - batch * side.length;
    return true;
  }

  __device__ __forceinline__ void advance() { index += kVectorWarps; }
};

template <class Element>
__device__ __forceinline__ const Element* token_of(const HeadsView& view, int batch, int token) {
  return static_cast<const Element*>(view.data) + batch * view.stride_batch + token * view.stride_token;
}

}  // namespace selfattn::cuda
