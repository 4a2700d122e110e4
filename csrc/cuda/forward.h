#pragma once

// One run of a family's forward kernel, for attention among tokens and for chunks over a KV cache.

#include <functional>
#include <optional>

#include "attention/gradients.h"
#include "binding.h"

namespace selfattn::cuda {

/// Tensors of any layout that the family can read, or is given a copy of; the rest as ForwardParams has it.
struct ForwardCall {
  const at::Tensor &query, &key, &value;
  const OptionalTensor& sinks;
  double scale;
  double softcap;
  AttentionShape shape;
  AttentionWindow window;
  KeyPages pages = {};
};

/// `segments_of`: what the tables are made of, for a kernel with tiles of these sizes; no value: there are no tables.
AttentionResults run_forward(const ForwardCall& call,
                             const std::function<std::optional<SegmentProblem>(const TileSizes&)>& segments_of);

}  // namespace selfattn::cuda
