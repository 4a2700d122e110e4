#include "distributed/deal_tokens.h"

#include <algorithm>
#include <numeric>
#include <unordered_map>

namespace selfattn {
namespace {

/// Split documents are cut at multiples of a kernel's block of keys.
constexpr int64_t kBlock = 128;
constexpr int64_t kShortestPart = 512;
/// What filling a shard counts, beside its share of the work.
constexpr double kTokensWeight = 0.98;

/// Tokens [begin, end) of a document, which go to one rank if they can.
struct Part {
  int64_t document, begin, end;

  int64_t length() const { return end - begin; }
  /// Causal pairs.
  double work() const { return 0.5 * (static_cast<double>(end) * end - static_cast<double>(begin) * begin); }
};

/// Where each of so many equal parts of a row begins, and the last one ends.
std::vector<int64_t> cut_evenly(int64_t length, int64_t parts) {
  std::vector<int64_t> begins(parts + 1);
  for (int64_t i = 0; i <= parts; ++i) begins[i] = length * i / parts;
  return begins;
}

/// Halves of equal shares, from both ends of the row inwards.
std::vector<int64_t> deal_head_tail(int64_t length, int64_t ranks) {
  const std::vector<int64_t> begins = cut_evenly(length, ranks);
  std::vector<int64_t> owners(length);
  auto head = owners.begin();
  auto tail = owners.end();
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const int64_t share = begins[rank + 1] - begins[rank], of_tail = share / 2;
    head = std::fill_n(head, share - of_tail, rank);
    tail -= of_tail;
    std::fill_n(tail, of_tail, rank);
  }
  return owners;
}

std::vector<int64_t> deal_contiguous(int64_t length, int64_t ranks) {
  const std::vector<int64_t> begins = cut_evenly(length, ranks);
  std::vector<int64_t> owners(length);
  for (int64_t i = 0; i < ranks; ++i) std::fill(owners.begin() + begins[i], owners.begin() + begins[i + 1], i);
  return owners;
}

/// Parts of documents, the most work first: those that are at most half of a rank's work and half a shard stay whole.
std::vector<Part> cut_documents(const RowDocuments& documents, int64_t ranks, int64_t shard, double work_of_rank) {
  std::vector<Part> parts;
  for (int64_t document = 0; document < documents.count(); ++document) {
    const int64_t length = documents.length(document);
    const Part whole{document, 0, length};
    int64_t step = length;
    if (length > kShortestPart && (whole.work() > work_of_rank / 2 || length > shard / 2)) {
      const int64_t of_document = (length + 2 * ranks - 1) / (2 * ranks);
      step = std::max(kShortestPart, (of_document + kBlock - 1) / kBlock * kBlock);
    }
    for (int64_t begin = 0; begin < length; begin += step) {
      parts.push_back({document, begin, std::min(begin + step, length)});
    }
  }
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.work() > b.work(); });
  return parts;
}

class Dealer {
 public:
  Dealer(const RowDocuments& documents, int64_t length, int64_t ranks)
      : documents_(documents),
        owners_(length),
        shard_((length + ranks - 1) / ranks),
        room_(ranks, shard_),
        load_(ranks, 0.0) {}

  std::vector<int64_t> deal() && {
    double work = 0.0;
    for (int64_t document = 0; document < documents_.count(); ++document) {
      work += Part{document, 0, documents_.length(document)}.work();
    }
    const double work_of_rank = work / ranks();
    std::vector<Part> left;
    for (const Part& part : cut_documents(documents_, ranks(), shard_, work_of_rank)) {
      const int64_t rank = find_rank(part, work_of_rank);
      rank < 0 ? left.push_back(part) : give(part, rank);
    }
    for (Part part : left) {
      while (part.length() > 0) {
        const int64_t rank = find_least_loaded();
        const Part piece{part.document, part.begin, std::min(part.end, part.begin + room_[rank])};
        give(piece, rank);
        part.begin = piece.end;
      }
    }
    int64_t rank = 0;
    for (const int64_t token : documents_.padding) {
      while (room_[rank] == 0) ++rank;
      owners_[token] = rank, --room_[rank];
    }
    return std::move(owners_);
  }

 private:
  int64_t ranks() const { return static_cast<int64_t>(room_.size()); }

  /// The rank that ends with the least of its larger share, of work or of tokens; -1 where none has room.
  int64_t find_rank(const Part& part, double work_of_rank) const {
    int64_t best = -1;
    double least = 0.0;
    for (int64_t rank = 0; rank < ranks(); ++rank) {
      if (room_[rank] < part.length()) continue;
      const double tokens = static_cast<double>(shard_ - room_[rank] + part.length()) / shard_;
      const double share = std::max((load_[rank] + part.work()) / work_of_rank, tokens * kTokensWeight);
      if (best < 0 || share < least) best = rank, least = share;
    }
    return best;
  }

  /// Of those with room.
  int64_t find_least_loaded() const {
    int64_t best = -1;
    for (int64_t rank = 0; rank < ranks(); ++rank) {
      if (room_[rank] > 0 && (best < 0 || load_[rank] < load_[best])) best = rank;
    }
    return best;
  }

  void give(const Part& part, int64_t rank) {
    const int64_t* tokens = documents_.tokens.data() + documents_.begins[part.document];
    for (int64_t i = part.begin; i < part.end; ++i) owners_[tokens[i]] = rank;
    room_[rank] -= part.length();
    load_[rank] += part.work();
  }

  const RowDocuments& documents_;
  std::vector<int64_t> owners_;
  int64_t shard_;
  std::vector<int64_t> room_;
  std::vector<double> load_;
};

}  // namespace

bool RowDocuments::are_runs() const {
  for (int64_t document = 0; document < count(); ++document) {
    const int64_t first = tokens[begins[document]], last = tokens[begins[document + 1] - 1];
    if (last - first + 1 != length(document)) return false;
  }
  return true;
}

RowDocuments find_documents(const int32_t* ids, int64_t length) {
  RowDocuments documents;
  std::unordered_map<int32_t, int64_t> numbers;
  std::vector<int64_t> number_of(length, -1);
  std::vector<int64_t> lengths;
  for (int64_t i = 0; i < length; ++i) {
    if (ids[i] < 0) {
      documents.padding.push_back(i);
      continue;
    }
    if (i > 0 && ids[i] == ids[i - 1]) {
      number_of[i] = number_of[i - 1];
    } else {
      number_of[i] = numbers.try_emplace(ids[i], static_cast<int64_t>(lengths.size())).first->second;
      if (number_of[i] == static_cast<int64_t>(lengths.size())) lengths.push_back(0);
    }
    ++lengths[number_of[i]];
  }
  documents.begins.resize(lengths.size() + 1);
  std::partial_sum(lengths.begin(), lengths.end(), documents.begins.begin() + 1);
  documents.tokens.resize(documents.begins.back());
  std::vector<int64_t> next = documents.begins;
  for (int64_t i = 0; i < length; ++i) {
    if (number_of[i] >= 0) documents.tokens[next[number_of[i]]++] = i;
  }
  return documents;
}

std::vector<int64_t> deal_tokens(const RowDocuments& documents, int64_t length, int64_t ranks, ContextBalance balance) {
  switch (balance) {
    case ContextBalance::kHeadTail:
      return deal_head_tail(length, ranks);
    case ContextBalance::kContiguous:
      return deal_contiguous(length, ranks);
    case ContextBalance::kDocuments:
      break;
  }
  return Dealer(documents, length, ranks).deal();
}

}  // namespace selfattn
