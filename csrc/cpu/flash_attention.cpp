// flash_attention and its backward on CPU: tensors -> problem -> tasks on threads.
#include <torch/library.h>

#include "cpu/flash_attention.h"

#include "attention/flash_attention_op.h"
#include "cpu/for_each_task.h"
#include "cpu/gemm.h"
#include "cpu/select_kernels.h"
#include "cpu/token_view.h"

namespace selfattn {
namespace {

using namespace cpu;

constexpr int64_t kTasksPerThread = 4;  // enough for an even load, once
constexpr int64_t kTasksOfWave = 64;    // and for many waves, each of which ends in a barrier
// Unevenness at which steps with more tasks become faster than whole heads. Backward, whole heads take five products a
// pair where steps take seven.
constexpr double kMostUnevenForward = 1.1, kMostUnevenBackward = 7.0 / 5.0;
constexpr int64_t kLeastSplitKeys = 512;

/// Memory for packed operands, freed at the end of the call.
class PackedMemory {
 public:
  void* allocate(int64_t bytes) { return memory_.emplace_back(c10::GetCPUAllocator()->allocate(bytes)).get(); }

 private:
  std::vector<at::DataPtr> memory_;
};

at::Tensor contiguous_floats(const OptionalTensor& tensor) {
  return tensor ? tensor->to(at::kFloat).contiguous() : at::Tensor();
}

/// A call's tensors in the form that the kernels read, and the plain problem that points to them.
struct Call {
  explicit Call(const AttentionProblem& attention)
      : query(with_contiguous_rows(attention.query)),
        key(with_contiguous_rows(attention.key)),
        value(with_contiguous_rows(attention.value)),
        choice(select_kernels(query.scalar_type())) {
    if (attention.has_segments()) {
      query_ids = attention.query_segment_ids->contiguous();
      key_ids = attention.key_segment_ids->contiguous();
    }
    if (attention.has_positions()) {
      query_positions = attention.query_positions->contiguous();
      key_positions = attention.key_positions->contiguous();
    }
    const auto data_of = [](const at::Tensor& tensor) {
      return tensor.defined() ? tensor.const_data_ptr<int32_t>() : nullptr;
    };
    const int64_t group = query.size(2) / key.size(2);
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - kPanel;
    TORCH_CHECK_VALUE(key.size(1) <= kMost && query.size(1) * group <= kMost, "selfattn: at most ", kMost,
                      " keys, and queries times heads of a group, are supported on CPU; got ", key.size(1), " and ",
                      query.size(1) * group);
    static_cast<PairRules&>(problem) = {.batch = query.size(0),
                                        .query_length = query.size(1),
                                        .key_length = key.size(1),
                                        .group = group,
                                        .is_causal = attention.is_causal,
                                        .window_left = attention.window_left,
                                        .window_right = attention.window_right,
                                        .query_ids = data_of(query_ids),
                                        .key_ids = data_of(key_ids),
                                        .query_positions = data_of(query_positions),
                                        .key_positions = data_of(key_positions)};
    pair_table = make_pair_table(problem);
    problem.query_heads = query.size(2), problem.key_heads = key.size(2);
    problem.head_dim = query.size(3), problem.value_dim = value.size(3);
    problem.scale = attention.scale, problem.softcap = attention.softcap;
    problem.query = view_of(query), problem.key = view_of(key), problem.value = view_of(value);
    problem.pair_table = &pair_table;
    problem.matrix_unit = choice.matrix_unit;
  }
  Call(const Call&) = delete;

  const FlashKernels& kernels() const { return *choice.kernels; }
  int64_t query_tiles() const { return problem.heads() * problem.tiles(); }

  /// kernel(problem, task, workspace) for the tasks of the heads [first, end), the last task first: under causality the
  /// last tiles of a head have most keys, and a long task should not start last.
  template <typename Problem, typename Kernel>
  void run(const Problem& of_call, Kernel kernel, int64_t tasks_per_head, int64_t first, int64_t end,
           int64_t workspace_bytes) const {
    const int64_t last = end * tasks_per_head - 1;
    for_each_task((end - first) * tasks_per_head, workspace_bytes,
                  [&](int64_t task, void* workspace) { kernel(of_call, last - task, workspace); },
                  [&] {
                    if (choice.matrix_unit) release_matrix_unit();
                  });
  }

  /// Heads whose tasks, so many each, keep all threads busy.
  int64_t heads_of_wave(int64_t tasks_per_head) const {
    const int64_t wanted = kTasksOfWave * at::get_num_threads();
    return std::clamp<int64_t>(wanted / std::max<int64_t>(tasks_per_head, 1), 1, problem.heads());
  }

  void* transposed_memory(int64_t heads, int64_t dim) {
    return memory.allocate(heads * kernels().transposed_elements(problem, dim) * kernels().compute_bytes);
  }
  void* rows_memory(int64_t heads, int64_t dim) {
    return memory.allocate(heads * kernels().rows_elements(problem, dim) * kernels().compute_bytes);
  }

  uint64_t* block_words(int64_t heads) {
    const int64_t words = heads * problem.blocks();
    return static_cast<uint64_t*>(memory.allocate(words * static_cast<int64_t>(sizeof(uint64_t))));
  }

  at::Tensor query, key, value, query_ids, key_ids, query_positions, key_positions;
  KernelChoice choice;
  PairTable pair_table;
  FlashProblem problem{};
  PackedMemory memory;
};

/// Parts that the keys of each tile are split into, so that few tiles with many keys keep all threads busy.
int64_t count_splits(const Call& call) {
  const int64_t tiles = std::max<int64_t>(call.query_tiles(), 1);
  const int64_t wanted = (kTasksPerThread * at::get_num_threads() + tiles - 1) / tiles;
  int64_t most_keys = 0;
  for (const QueryTile& tile : call.pair_table.query_tiles)
    most_keys = std::max<int64_t>(most_keys, tile.end_key - tile.first_key);
  return std::clamp<int64_t>(most_keys / kLeastSplitKeys, 1, wanted);
}

/// Whether whole heads, one a task, load the threads so evenly that it takes at most `limit` times the least time.
bool heads_load_evenly(const Call& call, double limit) {
  const int64_t threads = at::get_num_threads(), heads = call.problem.heads();
  const int64_t rounds = (heads + threads - 1) / threads;
  return static_cast<double>(rounds * threads) <= limit * static_cast<double>(heads);
}

void run_forward(Call& call, ForwardProblem& problem) {
  const FlashKernels& kernels = call.kernels();
  const int64_t heads = problem.heads(), tiles = problem.tiles();
  problem.splits = count_splits(call);
  if (problem.splits == 1 && tiles > 1 && heads_load_evenly(call, kMostUnevenForward)) {
    return call.run(problem, kernels.attend_head, 1, 0, heads, kernels.head_forward_workspace_bytes(problem));
  }
  if (problem.splits > 1) {
    const int64_t floats = heads * tiles * problem.splits * kernels.part_floats(problem);
    problem.parts = static_cast<float*>(call.memory.allocate(floats * static_cast<int64_t>(sizeof(float))));
  }
  // Where one tile reads all keys of a head, it packs them as it goes, and they pass through memory only once.
  const bool packs_ahead = tiles > 1;
  const int64_t wave = packs_ahead ? call.heads_of_wave(tiles) : heads;
  if (packs_ahead) {
    problem.key_transposed = call.transposed_memory(wave, problem.head_dim);
    problem.value_rows = call.rows_memory(wave, problem.value_dim);
    problem.nonfinite_values = call.block_words(wave);
  }
  const int64_t workspace_bytes = kernels.forward_workspace_bytes(problem);
  for (int64_t first = 0; first < heads; first += wave) {
    const int64_t end = std::min(first + wave, heads);
    problem.first_head = first;
    if (packs_ahead) call.run(problem, kernels.pack_forward, problem.blocks(), first, end, workspace_bytes);
    call.run(problem, kernels.attend, tiles * problem.splits, first, end, workspace_bytes);
  }
  if (problem.parts) call.run(problem, kernels.merge, tiles, 0, heads, workspace_bytes);
}

void run_backward(Call& call, BackwardProblem& problem) {
  const FlashKernels& kernels = call.kernels();
  if (heads_load_evenly(call, kMostUnevenBackward)) {
    call.run(problem, kernels.head_gradients, 1, 0, problem.heads(), kernels.head_workspace_bytes(problem));
    return;
  }
  const int64_t spans = kernels.key_spans(problem), tiles = problem.tiles();
  const int64_t wave = call.heads_of_wave(std::min(spans, tiles));
  problem.key_transposed = call.transposed_memory(wave, problem.head_dim);
  problem.value_transposed = call.transposed_memory(wave, problem.value_dim);
  problem.key_rows = call.rows_memory(wave, problem.head_dim);
  problem.nonfinite_keys = call.block_words(wave);
  problem.query_tiles = static_cast<char*>(call.memory.allocate(wave * tiles * kernels.query_tile_bytes(problem)));
  const int64_t workspace_bytes = kernels.backward_workspace_bytes(problem);
  for (int64_t first = 0; first < problem.heads(); first += wave) {
    const int64_t end = std::min(first + wave, problem.heads());
    problem.first_head = first;
    call.run(problem, kernels.pack_keys, problem.blocks(), first, end, workspace_bytes);
    call.run(problem, kernels.pack_queries, tiles, first, end, workspace_bytes);
    call.run(problem, kernels.key_gradients, spans, first, end, workspace_bytes);
    call.run(problem, kernels.query_gradients, tiles, first, end, workspace_bytes);
  }
}

InputGradients attend_backward(const AttentionProblem& attention, const AttentionGradients& gradients) {
  const auto [grad_query, grad_key, grad_value] = empty_gradients(attention);
  if (attention.query.size(2) == 0) return {grad_query, grad_key.zero_(), grad_value.zero_()};

  Call call(attention);
  const at::Tensor grad_rows = with_contiguous_rows(gradients.grad_out);
  const at::Tensor out_rows = with_contiguous_rows(gradients.out);
  const at::Tensor lse = gradients.lse.contiguous();
  const at::Tensor grad_lse = gradients.grad_lse ? gradients.grad_lse->contiguous() : at::Tensor();
  BackwardProblem problem{call.problem};
  problem.out = view_of(out_rows);
  problem.grad_out = view_of(grad_rows);
  problem.lse = lse.const_data_ptr<float>();
  problem.grad_lse = grad_lse.defined() ? grad_lse.const_data_ptr<float>() : nullptr;
  problem.grad_query = view_of(grad_query);
  problem.grad_key = view_of(grad_key);
  problem.grad_value = view_of(grad_value);
  run_backward(call, problem);
  return {grad_query, grad_key, grad_value};
}

}  // namespace

AttentionResults cpu::attend(const AttentionProblem& attention) {
  const auto [out, lse] = empty_results(attention);
  if (lse.numel() == 0) return {out, lse};

  Call call(attention);
  const at::Tensor sink_floats = contiguous_floats(attention.sinks);
  ForwardProblem problem{call.problem};
  problem.sinks = sink_floats.defined() ? sink_floats.const_data_ptr<float>() : nullptr;
  problem.out = view_of(out);
  problem.lse = lse.mutable_data_ptr<float>();
  run_forward(call, problem);
  return {out, lse};
}

}  // namespace selfattn

TORCH_LIBRARY_IMPL(selfattn, CPU, m) {
  using namespace selfattn;
  m.impl("flash_attention", TORCH_FN(flash_attention_from_schema<checked<cpu::attend>>));
  m.impl("flash_attention_backward", TORCH_FN(FlashAttentionBackward::from_schema<checked<attend_backward>>));
}
