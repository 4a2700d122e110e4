// The cache of a model's layers and the allocator of its pages, as selfattn/kv_cache.py has them.
#include <ATen/TensorIndexing.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <selfattn/kv_cache.h>

#include <algorithm>
#include <map>

namespace selfattn {
namespace {

void check_positive(int64_t size, const char* name) {
  TORCH_CHECK_VALUE(size > 0, "selfattn: ", name, " must be positive; got ", size);
}

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

void check_rows(const at::Tensor& indices, const at::Tensor& lengths) {
  TORCH_CHECK_VALUE(indices.dim() == 1 && indices.size(0) == lengths.size(0),
                    "selfattn: indices must hold one row for each of ", lengths.size(0), "; got shape ",
                    indices.sizes());
}

}  // namespace

KVCache::KVCache(const KVCacheOptions& options, int64_t pages, int64_t page_size, int64_t rows,
                 std::optional<at::Tensor> page_table)
    : page_table_(std::move(page_table)) {
  check_positive(options.layers(), "layers");
  check_positive(options.num_kv_heads(), "num_kv_heads");
  check_positive(options.head_dim(), "head_dim");
  const int64_t value_dim = options.value_dim().value_or(options.head_dim());
  check_positive(value_dim, "value_dim");
  const auto of = at::TensorOptions().dtype(options.dtype()).device(options.device());
  for (int64_t layer = 0; layer < options.layers(); ++layer) {
    keys_.push_back(at::zeros({pages, page_size, options.num_kv_heads(), options.head_dim()}, of));
    values_.push_back(at::zeros({pages, page_size, options.num_kv_heads(), value_dim}, of));
  }
  lengths_ = at::zeros({rows}, of.dtype(at::kInt));
}

KVCache KVCache::dense(const KVCacheOptions& options, int64_t batch, int64_t max_length) {
  check_positive(batch, "batch");
  check_positive(max_length, "max_length");
  return KVCache(options, batch, max_length, batch, std::nullopt);
}

KVCache KVCache::paged(const KVCacheOptions& options, int64_t num_pages, int64_t page_size, int64_t max_sequences,
                       int64_t max_length) {
  check_positive(num_pages, "num_pages");
  check_positive(page_size, "page_size");
  check_positive(max_sequences, "max_sequences");
  check_positive(max_length, "max_length");
  const auto integers = at::TensorOptions().dtype(at::kInt).device(options.device());
  return KVCache(options, num_pages, page_size, max_sequences,
                 at::full({max_sequences, divide_up(max_length, page_size)}, -1, integers));
}

KVCacheLayer KVCache::layer(int64_t index) const {
  TORCH_CHECK_VALUE(index >= 0 && index < layers(), "selfattn: index must be a layer of the cache, from 0 to ",
                    layers() - 1, "; got ", index);
  return {keys_[index], values_[index], lengths_, page_table_};
}

int64_t KVCache::capacity() const { return page_size() * (page_table_ ? page_table_->size(1) : 1); }

void KVCache::advance(int64_t count) { lengths_.add_(count); }
void KVCache::advance(const at::Tensor& counts) { lengths_.add_(counts); }
void KVCache::reset() { lengths_.zero_(); }
void KVCache::reset(const at::Tensor& rows) { lengths_.index_fill_(0, rows, 0); }

void KVCache::reorder(const at::Tensor& indices) {
  TORCH_CHECK_VALUE(!page_table_, "selfattn: a paged cache must be reordered by its PageAllocator");
  check_rows(indices, lengths_);
  copy_pages(indices, at::arange(indices.size(0), indices.options()));
  lengths_.copy_(lengths_.index_select(0, indices));
}

void KVCache::copy_pages(const at::Tensor& copied, const at::Tensor& onto) {
  for (auto* caches : {&keys_, &values_}) {
    for (at::Tensor& cache : *caches) cache.index_copy_(0, onto, cache.index_select(0, copied));
  }
}

PageAllocator::PageAllocator(KVCache cache) : cache_(std::move(cache)) {
  TORCH_CHECK_VALUE(cache_.page_table(), "selfattn: cache must be one of KVCache::paged; got a dense one");
  const int64_t pages = cache_.keys_.front().size(0);
  for (int64_t page = pages; page-- > 0;) free_.push_back(page);
  rows_with_page_.resize(pages);
  pages_of_row_.resize(cache_.lengths_.size(0));
}

const PageAllocator::Pages& PageAllocator::pages_of(int64_t sequence) const {
  const auto rows = static_cast<int64_t>(pages_of_row_.size());
  TORCH_CHECK_VALUE(sequence >= 0 && sequence < rows, "selfattn: sequence must be a row of the cache, from 0 to ",
                    rows - 1, "; got ", sequence);
  return pages_of_row_[sequence];
}

void PageAllocator::require_free(int64_t missing, int64_t free) const {
  TORCH_CHECK(missing <= free, "selfattn: out of pages: ", missing, " more are needed, and of ", rows_with_page_.size(),
              " pages ", free, " are free; release a sequence, or make the cache with more pages");
}

void PageAllocator::reserve(int64_t sequence, int64_t tokens) {
  const auto held = static_cast<int64_t>(pages_of(sequence).size());
  TORCH_CHECK_VALUE(tokens >= 0 && tokens <= cache_.capacity(), "selfattn: tokens must be from 0 to ",
                    cache_.capacity(), "; got ", tokens);
  const int64_t missing = std::max<int64_t>(divide_up(tokens, cache_.page_size()) - held, 0);
  require_free(missing, free_pages());
  Pages added(free_.rbegin(), free_.rbegin() + missing);
  free_.resize(free_.size() - missing);
  extend(sequence, added);
}

int64_t PageAllocator::share(int64_t source, int64_t sequence, int64_t tokens) {
  const Pages& pages = pages_of(source);
  TORCH_CHECK_VALUE(pages_of(sequence).empty(), "selfattn: sequence must have no pages; got ", sequence,
                    ", which has some");
  const int64_t page_size = cache_.page_size(), most = static_cast<int64_t>(pages.size()) * page_size;
  TORCH_CHECK_VALUE(tokens >= 0 && tokens <= most, "selfattn: tokens must be from 0 to ", most,
                    ", which the source has pages for; got ", tokens);
  const Pages shared(pages.begin(), pages.begin() + tokens / page_size);
  extend(sequence, shared);
  const auto length = static_cast<int64_t>(shared.size()) * page_size;
  cache_.lengths_[sequence].fill_(length);
  return length;
}

void PageAllocator::release(int64_t sequence) {
  const Pages pages = pages_of(sequence);
  for (auto page = pages.rbegin(); page != pages.rend(); ++page) {
    if (--rows_with_page_[*page] == 0) free_.push_back(*page);
  }
  pages_of_row_[sequence].clear();
  (*cache_.page_table_)[sequence].fill_(-1);
  cache_.lengths_[sequence].zero_();
}

void PageAllocator::extend(int64_t sequence, const Pages& pages) {
  Pages& own = pages_of_row_[sequence];
  const auto first = static_cast<int64_t>(own.size());
  own.insert(own.end(), pages.begin(), pages.end());
  for (const int64_t page : pages) ++rows_with_page_[page];
  write(sequence, first);
}

void PageAllocator::write(int64_t sequence, int64_t first) {
  const Pages& pages = pages_of_row_[sequence];
  const auto count = static_cast<int64_t>(pages.size()) - first;
  if (count == 0) return;
  at::Tensor entries = at::tensor(at::ArrayRef<int64_t>(pages).slice(first), at::kInt);
  if (cache_.page_table_->is_cuda()) entries = entries.pin_memory();
  (*cache_.page_table_)[sequence].narrow(0, first, count).copy_(entries, /*non_blocking=*/true);
}

void PageAllocator::reorder(const at::Tensor& indices) {
  check_rows(indices, cache_.lengths_);
  const at::Tensor sources = indices.to(at::kCPU, at::kLong).contiguous();
  const at::Tensor lengths = cache_.lengths_.to(at::kCPU, at::kLong).contiguous();
  const int64_t page_size = cache_.page_size(), rows = sources.size(0);
  // The first row that takes a source's place has its pages behind the full ones, too; every other one gets new ones.
  std::map<int64_t, int64_t> heirs;
  std::vector<Pages> kept;
  Pages added;
  std::vector<int64_t> rows_with_page(rows_with_page_.size());
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t source = sources.const_data_ptr<int64_t>()[row];
    const Pages& pages = pages_of(source);
    const bool is_heir = heirs.try_emplace(source, row).first->second == row;
    const auto held = static_cast<int64_t>(pages.size());
    const int64_t count = is_heir ? held : lengths.const_data_ptr<int64_t>()[source] / page_size;
    kept.emplace_back(pages.begin(), pages.begin() + count);
    added.push_back(held - count);
    for (const int64_t page : kept.back()) ++rows_with_page[page];
  }
  Pages free;
  for (auto page = static_cast<int64_t>(rows_with_page.size()); page-- > 0;) {
    if (rows_with_page[page] == 0) free.push_back(page);
  }
  int64_t missing = 0;
  for (const int64_t count : added) missing += count;
  require_free(missing, static_cast<int64_t>(free.size()));

  Pages copied, onto;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t source = sources.const_data_ptr<int64_t>()[row];
    for (int64_t i = 0; i < added[row]; ++i) {
      const int64_t page = free.back();
      free.pop_back();
      if (i == 0 && lengths.const_data_ptr<int64_t>()[source] % page_size != 0) {
        copied.push_back(pages_of_row_[source][kept[row].size()]);
        onto.push_back(page);
      }
      kept[row].push_back(page);
      ++rows_with_page[page];
    }
  }
  free_ = std::move(free), rows_with_page_ = std::move(rows_with_page), pages_of_row_ = std::move(kept);
  cache_.page_table_->fill_(-1);
  for (int64_t row = 0; row < rows; ++row) write(row, 0);
  const auto index = [&](const Pages& pages) { return at::tensor(pages, at::kLong).to(cache_.lengths_.device()); };
  cache_.copy_pages(index(copied), index(onto));
  cache_.lengths_.copy_(cache_.lengths_.index_select(0, sources.to(cache_.lengths_.device())));
}

}  // namespace selfattn
