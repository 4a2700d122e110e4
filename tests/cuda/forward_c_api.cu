// The forward kernels behind a C function, for tuning without torch headers: build this file with csrc/cuda/flash/*.cu
// and load it with ctypes; the fields of ForwardCall are the interface.
#include "../../csrc/cuda/flash/params.h"

using namespace selfattn::cuda;

// What Python fills in; strides in elements, batch, token, head. ids null: no segments.
struct ForwardCall {
  void *q, *k, *v, *out;
  float* lse;
  const float* sinks;
  const void *query_ids, *key_ids;  // int32 or int64, contiguous
  void* scratch;                    // selfattn_scratch_bytes(call)
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];
  int batch, query_length, key_length, num_heads, num_kv_heads, dim_qk, dim_v;
  int window_left, window_right;  // AttentionWindow
  int is_half, ids_are_int64;
  float scale;
};

namespace {

TensorView view(void* data, const int64_t (&strides)[3]) { return {data, strides[0], strides[1], strides[2]}; }

AttentionShape shape_of(const ForwardCall& c) {
  return {c.batch, c.query_length, c.key_length, c.num_heads, c.num_kv_heads, c.dim_qk, c.dim_v};
}

SegmentProblem segments_of(const ForwardCall& c) {
  const TileSizes tiles = flash_attention_forward_tiles(shape_of(c));
  return {c.query_ids,
          c.key_ids,
          c.ids_are_int64 != 0,
          c.query_length,
          1,
          c.key_length,
          1,
          c.batch,
          c.query_length,
          c.key_length,
          tiles.query,
          tiles.key,
          c.window_left,
          c.window_right,
          SegmentSide::kQueries};
}

}  // namespace

extern "C" int64_t selfattn_scratch_bytes(const ForwardCall* call) {
  return call->query_ids ? segment_tables_bytes(segments_of(*call)) : 256;
}

extern "C" int selfattn_prepare_segments(const ForwardCall* call, cudaStream_t stream) {
  const SegmentProblem problem = segments_of(*call);
  return launch_prepare_segments(problem, make_segment_tables(problem, call->scratch), stream);
}

// prepare: run selfattn_prepare_segments too, as the operator does.
extern "C" int selfattn_forward(const ForwardCall* call, int prepare, cudaStream_t stream) {
  const ForwardCall& c = *call;
  ForwardParams params{};
  params.shape = shape_of(c);
  params.window = {c.window_left, c.window_right};
  params.element = c.is_half ? ElementType::kHalf : ElementType::kBFloat16;
  params.scale = c.scale;
  params.q = view(c.q, c.q_strides), params.k = view(c.k, c.k_strides), params.v = view(c.v, c.v_strides);
  params.out = view(c.out, c.out_strides);
  params.lse = c.lse;
  params.sinks = c.sinks;
  params.counters = static_cast<int*>(c.scratch);
  if (c.query_ids) {
    const SegmentProblem problem = segments_of(c);
    params.segments = make_segment_tables(problem, c.scratch);
    params.counters = params.segments.counters;
    if (prepare) {
      const int status = selfattn_prepare_segments(call, stream);
      if (status) return status;
    }
  }
  return launch_flash_attention_forward(params, stream);
}
