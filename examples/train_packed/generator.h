#pragma once

#include <selfattn/kv_cache.h>
#include <torch/script.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "repeated_step.h"

constexpr int64_t kBoundary = 256;  // the token that opens and ends a document

/// A prompt and what is generated from it.
struct Sequence {
  explicit Sequence(const std::string& prompt);
  /// One more token: the boundary, or one that makes it max_bytes, ends the sequence.
  void append(int64_t token, int64_t max_bytes);

  std::vector<int64_t> prompt;     ///< behind the boundary that opens a document
  std::vector<int64_t> generated;  ///< with the boundary, where it ended the text
  bool has_ended = false;
  std::vector<at::Tensor> logits;  ///< (n, vocabulary) each, of the tokens that were read in turn, where recorded
};

struct GeneratorOptions {
  int64_t max_bytes;   ///< of a sequence
  int64_t rows;        ///< sequences at once
  double temperature;  ///< below 1: likely bytes are drawn more often than the model says; 0: the likeliest alone
  bool records_logits;
  at::Device device;
};

/// A KVCacheLayer as TorchScript knows it.
using ScriptCacheLayer = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>>;

/// Continues prompts with a scripted LanguageModel and a KV cache. Sequences join and leave a batch of a fixed number
/// of rows: a step computes the next token of every row, in constant shapes, and those of rows without a sequence are
/// dropped.
class CachedGenerator {
 public:
  /// max_length: tokens that a row has room for.
  CachedGenerator(torch::jit::Module model, int64_t max_length, const GeneratorOptions& options);

  /// Continues all to their ends; `on_step` is called after each step.
  void run(std::vector<Sequence>& sequences, const std::function<void()>& on_step);

 private:
  at::Tensor forward(const at::Tensor& tokens, const at::Tensor& segment_ids);
  void join(const std::vector<Sequence*>& sequences);
  void compute_step();
  void step();
  void deactivate_ended();
  std::vector<int64_t> free_rows() const;

  torch::jit::Module model_;
  GeneratorOptions options_;
  selfattn::KVCache cache_;
  std::vector<ScriptCacheLayer> layers_;
  std::vector<Sequence*> row_sequences_;  // null: free
  at::Tensor tokens_;                     // (rows, 1) int64: what each row reads next
  at::Tensor is_active_;                  // (rows,) int32: 1 where the row has a sequence
  at::Tensor logits_;                     // (rows, vocabulary) of the last step
  RepeatedStep repeated_step_;            // after what it works on
};

/// The same without a cache: for each token the whole sequence is computed again, one sequence after the other.
void generate_uncached(torch::jit::Module model, const GeneratorOptions& options, std::vector<Sequence>& sequences,
                       const std::function<void()>& on_step);
