#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>

namespace selfattn {

/// Throws c10::ValueError where a group cannot have so many ranks. `argument` is the caller's name for the number.
void check_group_size(int64_t size, const char* argument = "group_size");

/// The ranks of a process group by its name, and their collectives, those of `_c10d_functional`. They are looked up at
/// the first call: a PyTorch without torch.distributed has none.
///
/// What a start_... gives may be read after finish() alone: until then the collective runs beside what is computed.
class RankGroup {
 public:
  /// A rank by itself, which needs no process group.
  RankGroup() = default;
  /// Of nothing but what was said; nothing is looked up. `argument` is the caller's name for the size.
  RankGroup(std::string name, int64_t size, const char* argument)
      : name_(std::move(name)), size_(size), argument_(argument) {}

  int64_t size() const { return size_; }

  /// Of this process. Throws c10::ValueError where the group has not `size` ranks.
  int64_t rank() const;

  /// (...) contiguous of each rank -> (n, ...)
  at::Tensor start_gather(const at::Tensor& own) const;
  /// (n, ...) contiguous, of which [i] goes to rank i -> (n, ...), of which [i] came from rank i
  at::Tensor start_exchange(const at::Tensor& by_rank) const;
  /// (n, ...) contiguous of each rank -> (1, ...), the sum over ranks of what each has for this one
  at::Tensor start_sum(const at::Tensor& by_rank) const;
  /// What is finished already comes as it is.
  static at::Tensor finish(const at::Tensor& started);

 private:
  std::string name_;
  int64_t size_ = 1;
  const char* argument_ = "group_size";
};

}  // namespace selfattn
