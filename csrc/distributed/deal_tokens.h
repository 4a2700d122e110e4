#pragma once

#include <cstdint>
#include <vector>

// Which rank holds which tokens of one row, on the host.

namespace selfattn {

enum class ContextBalance { kDocuments, kHeadTail, kContiguous };

/// The tokens of a row by document: those of document d are tokens[begins[d]] .. tokens[begins[d + 1] - 1], ascending.
/// Documents come by their first tokens; padding belongs to none.
struct RowDocuments {
  std::vector<int64_t> tokens;
  std::vector<int64_t> begins = {0};
  std::vector<int64_t> padding;

  int64_t count() const { return static_cast<int64_t>(begins.size()) - 1; }
  int64_t length(int64_t document) const { return begins[document + 1] - begins[document]; }
  /// Whether the tokens of each stand side by side.
  bool are_runs() const;
};

RowDocuments find_documents(const int32_t* ids, int64_t length);

/// The rank of each token; none gets more than ceil(length / ranks) of them.
std::vector<int64_t> deal_tokens(const RowDocuments& documents, int64_t length, int64_t ranks, ContextBalance balance);

}  // namespace selfattn
