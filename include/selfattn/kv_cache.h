#pragma once

/// Where the keys and values of a model's layers are kept between calls, and who has which page of it: selfattn.KVCache
/// and selfattn.PageAllocator of Python in C++. R rows, each a sequence; P pages.

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>
#include <selfattn/export.h>
#include <torch/arg.h>

namespace selfattn {

/// The cache as one layer sees it.
struct KVCacheLayer {
  at::Tensor keys;                       ///< (P, page_size, NKV, DQK); a dense cache has a page a row
  at::Tensor values;                     ///< (P, page_size, NKV, DV)
  at::Tensor lengths;                    ///< (R,) int32, slots in use, one tensor for all layers
  std::optional<at::Tensor> page_table;  ///< (R, pages of a row) int32, -1 where there is no page; none: dense
};

/// What the tensors of a cache are made from.
struct KVCacheOptions {
  /// Of so many layers; everything else by default.
  KVCacheOptions(int64_t layers, int64_t num_kv_heads, int64_t head_dim)
      : layers_(layers), num_kv_heads_(num_kv_heads), head_dim_(head_dim) {}

  TORCH_ARG(int64_t, layers);                       ///< of the model
  TORCH_ARG(int64_t, num_kv_heads);                 ///< NKV
  TORCH_ARG(int64_t, head_dim);                     ///< DQK
  TORCH_ARG(std::optional<int64_t>, value_dim);     ///< DV; head_dim where not given
  TORCH_ARG(std::optional<at::ScalarType>, dtype);  ///< PyTorch's default where not given
  TORCH_ARG(at::Device, device) = at::kCPU;         ///< of every tensor
};

class PageAllocator;

/// Keys and values of every layer of a model, for a batch of sequences. Copies share their tensors.
class SELFATTN_API KVCache {
 public:
  /// A row of max_length slots for each of `batch` sequences. Throws c10::ValueError where a size is not positive.
  static KVCache dense(const KVCacheOptions& options, int64_t batch, int64_t max_length);

  /// A pool of num_pages pages, which a table deals out to at most max_sequences sequences of at most max_length
  /// tokens: by a PageAllocator, or by whoever writes it. With flash, page_size is a multiple of 16.
  static KVCache paged(const KVCacheOptions& options, int64_t num_pages, int64_t page_size, int64_t max_sequences,
                       int64_t max_length);

  /// The cache of one layer: no copies.
  KVCacheLayer layer(int64_t index) const;
  /// Of the model.
  int64_t layers() const { return static_cast<int64_t>(keys_.size()); }
  /// Slots of a page; a dense cache has a page a row.
  int64_t page_size() const { return keys_.front().size(1); }
  /// Slots of a row.
  int64_t capacity() const;
  /// (R,) int32, slots in use.
  const at::Tensor& lengths() const { return lengths_; }
  /// (R, pages of a row) int32; none where the cache is dense.
  const std::optional<at::Tensor>& page_table() const { return page_table_; }

  /// After all layers: so many more slots are in use in every row.
  void advance(int64_t count);
  /// The same, (R,) of each row.
  void advance(const at::Tensor& counts);
  /// Empties all rows; their pages stay theirs.
  void reset();
  /// The same of some rows (N,) int64.
  void reset(const at::Tensor& rows);
  /// Row i becomes what row indices[i] is, (R,) int64, in place: of a dense cache. A paged one is reordered by its
  /// PageAllocator.
  void reorder(const at::Tensor& indices);

 private:
  friend class PageAllocator;
  KVCache(const KVCacheOptions& options, int64_t pages, int64_t page_size, int64_t rows,
          std::optional<at::Tensor> page_table);
  void copy_pages(const at::Tensor& copied, const at::Tensor& onto);

  std::vector<at::Tensor> keys_, values_;
  at::Tensor lengths_;
  std::optional<at::Tensor> page_table_;
};

/// Who has which page of a paged cache, on the host: the free pages, and how many rows share each other one. It writes
/// the cache's table, from pinned memory and without waiting for the device; only reorder() reads from the device.
/// A sequence or number of tokens that the cache does not have is c10::ValueError.
class SELFATTN_API PageAllocator {
 public:
  /// `cache`: of KVCache::paged, whose table nobody else writes.
  explicit PageAllocator(KVCache cache);

  /// Pages that no sequence has.
  int64_t free_pages() const { return static_cast<int64_t>(free_.size()); }

  /// Gives a sequence pages for so many tokens in all; those that it has stay. c10::Error "out of pages" where too few
  /// are free; nothing is changed then.
  void reserve(int64_t sequence, int64_t tokens);

  /// Gives a sequence without pages the whole pages of the first `tokens` tokens of another, and that length; gives
  /// back how many tokens they hold.
  int64_t share(int64_t source, int64_t sequence, int64_t tokens);

  /// Ends a sequence: its length becomes 0, its entries -1, and pages that nobody shares are free.
  void release(int64_t sequence);

  /// Row i becomes what row indices[i] is, (R,) int64. Whole pages are shared; rows that would come to share what lies
  /// behind them get pages of their own there, with a copy of the unfilled last page. "out of pages" as reserve().
  void reorder(const at::Tensor& indices);

 private:
  using Pages = std::vector<int64_t>;
  const Pages& pages_of(int64_t sequence) const;
  void require_free(int64_t missing, int64_t free) const;
  void extend(int64_t sequence, const Pages& pages);
  void write(int64_t sequence, int64_t first);

  KVCache cache_;
  Pages free_;  // the next one last
  std::vector<int64_t> rows_with_page_;
  std::vector<Pages> pages_of_row_;
};

}  // namespace selfattn
