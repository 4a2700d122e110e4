#include "generator.h"

#include <algorithm>
#include <utility>

namespace {

/// Of each row of logits (N, vocabulary) one token (N,), without the host: the first of exponential clocks to ring,
/// each at the rate of its token's probability.
at::Tensor pick(const at::Tensor& logits, double temperature) {
  if (temperature == 0.0) return logits.argmax(-1);
  const at::Tensor rates = torch::softmax(logits / temperature, -1);
  return (rates / torch::empty_like(rates).exponential_()).argmax(-1);
}

std::vector<ScriptCacheLayer> as_script_argument(const selfattn::KVCache& cache) {
  std::vector<ScriptCacheLayer> layers;
  for (int64_t i = 0; i < cache.layers(); ++i) {
    const selfattn::KVCacheLayer layer = cache.layer(i);
    layers.emplace_back(layer.keys, layer.values, layer.lengths, layer.page_table);
  }
  return layers;
}

selfattn::KVCache make_cache(const torch::jit::Module& model, int64_t max_length, const GeneratorOptions& options) {
  const auto of = selfattn::KVCacheOptions(model.attr("num_layers").toInt(), model.attr("num_kv_heads").toInt(),
                                           model.attr("head_dim").toInt())
                      .dtype((*model.parameters().begin()).scalar_type())
                      .device(options.device);
  return selfattn::KVCache::dense(of, options.rows, max_length);
}

at::Tensor on_device(const std::vector<int64_t>& values, const at::Device& device) {
  return torch::tensor(values, at::kLong).to(device);
}

}  // namespace

Sequence::Sequence(const std::string& text) : prompt{kBoundary} {
  for (const unsigned char byte : text) prompt.push_back(byte);
}

void Sequence::append(int64_t token, int64_t max_bytes) {
  generated.push_back(token);
  has_ended = token == kBoundary || static_cast<int64_t>(generated.size()) == max_bytes;
}

CachedGenerator::CachedGenerator(torch::jit::Module model, int64_t max_length, const GeneratorOptions& options)
    : model_(std::move(model)),
      options_(options),
      cache_(make_cache(model_, max_length, options)),
      layers_(as_script_argument(cache_)),
      row_sequences_(options.rows),
      tokens_(torch::zeros({options.rows, 1}, at::TensorOptions(at::kLong).device(options.device))),
      is_active_(torch::zeros({options.rows}, at::TensorOptions(at::kInt).device(options.device))),
      repeated_step_([this] { compute_step(); }, options.device) {}

void CachedGenerator::run(std::vector<Sequence>& sequences, const std::function<void()>& on_step) {
  auto next = sequences.begin();
  const auto is_row_taken = [](const Sequence* sequence) { return sequence != nullptr; };
  while (next != sequences.end() || std::any_of(row_sequences_.begin(), row_sequences_.end(), is_row_taken)) {
    std::vector<Sequence*> joining;
    for (size_t room = free_rows().size(); room > 0 && next != sequences.end(); --room) joining.push_back(&*next++);
    joining.empty() ? step() : join(joining);
    deactivate_ended();
    on_step();
  }
}

/// tokens (B, S), segment_ids (B, S) or undefined -> logits (B, S, vocabulary)
at::Tensor CachedGenerator::forward(const at::Tensor& tokens, const at::Tensor& segment_ids) {
  const c10::IValue ids = segment_ids.defined() ? c10::IValue(segment_ids) : c10::IValue();
  return model_.forward({tokens, ids, /*positions=*/c10::IValue(), layers_}).toTensor();
}

/// Free rows read the prompts, all in one row of tokens, and give the first token of each.
void CachedGenerator::join(const std::vector<Sequence*>& sequences) {
  const std::vector<int64_t> rows = free_rows();
  std::vector<int64_t> taken, tokens, ids, last, counts(options_.rows), lengths;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const std::vector<int64_t>& prompt = sequences[i]->prompt;
    row_sequences_[rows[i]] = sequences[i];
    taken.push_back(rows[i]);
    lengths.push_back(counts[rows[i]] = static_cast<int64_t>(prompt.size()));
    tokens.insert(tokens.end(), prompt.begin(), prompt.end());
    ids.insert(ids.end(), prompt.size(), rows[i]);
    last.push_back(static_cast<int64_t>(tokens.size()) - 1);
  }
  const at::Tensor row = on_device(taken, options_.device);
  const at::Tensor logits =
      forward(on_device(tokens, options_.device).unsqueeze(0), on_device(ids, options_.device).unsqueeze(0)).squeeze(0);
  cache_.advance(on_device(counts, options_.device));
  const at::Tensor picked = pick(logits.index_select(0, on_device(last, options_.device)), options_.temperature);
  tokens_.index_copy_(0, row, picked.unsqueeze(1));
  is_active_.index_fill_(0, row, 1);

  const at::Tensor first = picked.cpu();
  const std::vector<at::Tensor> of_prompts = logits.split_with_sizes(lengths);
  for (size_t i = 0; i < sequences.size(); ++i) {
    sequences[i]->append(first[i].item<int64_t>(), options_.max_bytes);
    if (options_.records_logits) sequences[i]->logits.push_back(of_prompts[i]);
  }
}

/// What is done on the device alone, row b for row b of the cache. A row without a sequence writes its token to the
/// first slot, and stays empty.
void CachedGenerator::compute_step() {
  logits_ = forward(tokens_, {}).squeeze(1);
  tokens_.copy_(pick(logits_, options_.temperature).unsqueeze(1));
  cache_.advance(is_active_);
}

void CachedGenerator::step() {
  repeated_step_();
  const at::Tensor picked = tokens_.cpu();
  const at::Tensor logits = options_.records_logits ? logits_.clone() : at::Tensor();
  for (int64_t row = 0; row < options_.rows; ++row) {
    Sequence* sequence = row_sequences_[row];
    if (sequence == nullptr) continue;
    sequence->append(picked[row].item<int64_t>(), options_.max_bytes);
    if (options_.records_logits) sequence->logits.push_back(logits.narrow(0, row, 1));
  }
}

/// Sequences leave; their rows are empty, and free for others.
void CachedGenerator::deactivate_ended() {
  std::vector<int64_t> ended;
  for (int64_t row = 0; row < options_.rows; ++row) {
    if (row_sequences_[row] == nullptr || !row_sequences_[row]->has_ended) continue;
    row_sequences_[row] = nullptr;
    ended.push_back(row);
  }
  if (ended.empty()) return;
  const at::Tensor rows = on_device(ended, options_.device);
  cache_.reset(rows);
  is_active_.index_fill_(0, rows, 0);
}

std::vector<int64_t> CachedGenerator::free_rows() const {
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < options_.rows; ++row) {
    if (row_sequences_[row] == nullptr) rows.push_back(row);
  }
  return rows;
}

void generate_uncached(torch::jit::Module model, const GeneratorOptions& options, std::vector<Sequence>& sequences,
                       const std::function<void()>& on_step) {
  for (Sequence& sequence : sequences) {
    std::vector<int64_t> tokens = sequence.prompt;
    while (!sequence.has_ended) {
      const at::Tensor logits = model.forward({on_device(tokens, options.device).unsqueeze(0)}).toTensor().squeeze(0);
      const int64_t read = sequence.generated.empty() ? logits.size(0) : 1;
      if (options.records_logits) sequence.logits.push_back(logits.narrow(0, logits.size(0) - read, read).clone());
      tokens.push_back(pick(logits.narrow(0, logits.size(0) - 1, 1), options.temperature).item<int64_t>());
      sequence.append(tokens.back(), options.max_bytes);
      on_step();
    }
  }
}
