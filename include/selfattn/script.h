#pragma once

#include <selfattn/export.h>
#include <selfattn/self_attention.h>
#include <torch/csrc/jit/api/module.h>

namespace selfattn {

/// A TorchScript module that shares `module`'s parameters, with the names and the signature of the scripted Python
/// module: forward(x, freqs: Optional[Tuple[Tensor, Tensor]] = None, segment_ids: Optional[Tensor] = None, cache:
/// Optional[Tuple[Tensor, Tensor, Tensor, Optional[Tensor]]] = None), the cache being the tensors of a KVCacheLayer.
/// Saved, it loads wherever LibTorch and libselfattn.so are, in C++ or in Python.
SELFATTN_API torch::jit::Module to_torchscript(const SelfAttention& module);

}  // namespace selfattn
