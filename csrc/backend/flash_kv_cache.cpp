// This project's own kernels over a KV cache: the constraints that they put on a call.
#include <c10/util/StringUtil.h>

#include "common/device.h"
#include "common/kernel_limits.h"
#include "kv_cache/attention_op.h"

namespace selfattn {
namespace {

/// A kernel that a device registers is taken from then on; meta tensors stand for those of either device.
Reason has_kernel(const KvCacheProblem& problem) {
  static const auto op = find_op<decltype(flash_kv_cache_from_schema<nullptr>)>("selfattn::flash_attention_kv_cache");
  const at::Tensor& query = problem.query;
  if (!query.is_cuda() && !query.is_cpu() && !query.is_meta()) {
    return c10::str("q must be on a CPU or CUDA device; got ", query.device());
  }
  const bool serves_cpu = op.hasKernelForDispatchKey(c10::DispatchKey::CPU);
  const bool serves_cuda = op.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  if (query.is_cuda() ? serves_cuda : serves_cpu || (query.is_meta() && serves_cuda)) return std::nullopt;
  return c10::str("q is on ", query.device(), ", for which this build of selfattn has no kernels over a KV cache");
}

Reason supported_dtype(const KvCacheProblem& problem) {
  const auto dtype = problem.query.scalar_type();
  if (dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat) return std::nullopt;
  return c10::str("q must be bfloat16 or float16 or float32; got ", dtype);
}

Reason no_gradient(const KvCacheProblem& problem) {
  if (!problem.requires_grad()) return std::nullopt;
  const char* name = any_requires_grad({problem.query})   ? "q"
                     : any_requires_grad({problem.key})   ? "k_cache"
                     : any_requires_grad({problem.value}) ? "v_cache"
                                                          : "sinks";
  return c10::str(name, " must not require a gradient, since its kernels over a KV cache are not differentiable");
}

// ---------------------------------------------------------------- what the CUDA kernels need

FlashSupport find_cuda_support(const KvCacheProblem& problem) {
  const c10::Device device = problem.query.device();
  const auto capability = compute_capability(device);
  if (!capability) return {nullptr, c10::str("it needs compute capability 8.0 or newer; there is no device ", device)};
  return find_flash_support(device.index(), *capability, /*is_float32=*/false, /*is_aligned=*/true);
}

Reason supported_cuda_device(const KvCacheProblem& problem) {
  if (!problem.query.is_cuda() || has_kernel(problem)) return std::nullopt;
  const FlashSupport support = find_cuda_support(problem);
  if (support.limits) return std::nullopt;
  return support.reason;
}

Reason supported_cuda_dtype(const KvCacheProblem& problem) {
  if (!problem.query.is_cuda() || problem.query.scalar_type() != at::kFloat) return std::nullopt;
  return "q must be bfloat16 or float16 on CUDA; got Float";
}

Reason supported_cuda_dims(const KvCacheProblem& problem) {
  if (!problem.query.is_cuda()) return std::nullopt;
  const c10::SymInt dim = problem.head_dim(), value_dim = problem.value_head_dim();
  const FlashSupport support = find_cuda_support(problem);
  const int64_t most = support.limits ? support.limits->max_head_dim : 0;
  if (!support.limits ||
      (dim <= most && value_dim <= most && are_rows_aligned(dim, value_dim, problem.query.element_size()))) {
    return std::nullopt;
  }
  return c10::str("head dimensions must be multiples of ", kRowChunkBytes / problem.query.element_size(), " up to ",
                  most, " on CUDA; got ", dim, " and ", value_dim);
}

Reason aligned_cuda_caches(const KvCacheProblem& problem) {
  if (!problem.query.is_cuda()) return std::nullopt;
  for (const auto& [cache, name] : {std::pair(&problem.key, "k_cache"), std::pair(&problem.value, "v_cache")}) {
    const int64_t chunk = kRowChunkBytes / cache->element_size();
    bool is_aligned = cache->sym_stride(3) == 1 && cache->sym_storage_offset() % chunk == 0;
    for (int64_t dim = 0; dim < 3; dim++) {
      is_aligned = is_aligned && (cache->sym_size(dim) <= 1 || cache->sym_stride(dim) % chunk == 0);
    }
    is_aligned = is_aligned && (cache->sym_size(1) <= 1 || cache->sym_stride(1) != 0);
    if (!is_aligned) {
      return c10::str(name,
                      " must have a contiguous last dimension, tokens that do not lie over each other, and strides "
                      "and a storage offset that are multiples of ",
                      chunk, " elements on CUDA; got strides ", cache->sym_strides(), " and offset ",
                      cache->sym_storage_offset());
    }
  }
  return std::nullopt;
}

Reason supported_cuda_pages(const KvCacheProblem& problem) {
  if (!problem.query.is_cuda() || problem.pages_per_row() <= 1) return std::nullopt;
  if (problem.page_size() % kCachePageMultiple == 0) return std::nullopt;
  return c10::str("pages must hold a multiple of ", kCachePageMultiple,
                  " tokens on CUDA, where a row has several; got ", problem.page_size());
}

Reason rows_fit_cuda_kernels(const KvCacheProblem& problem) {
  if (!problem.query.is_cuda()) return std::nullopt;
  const FlashSupport support = find_cuda_support(problem);
  if (!support.limits || problem.capacity() <= support.limits->max_length) return std::nullopt;
  return c10::str("rows of the cache must hold at most ", support.limits->max_length, " tokens on CUDA; got ",
                  problem.capacity());
}

Reason countable_cuda_work(const KvCacheProblem& problem) {
  if (!problem.query.is_cuda() || problem.key_heads() == 0) return std::nullopt;
  const c10::SymInt tokens = problem.batch() * problem.query_length();
  const c10::SymInt tiles =
      tokens * problem.query_heads() / problem.key_heads() / kCacheTileRows + problem.rows() + 1 + problem.batch();
  const c10::SymInt units = problem.capacity() / kCacheUnitKeys + 3;
  if (tiles * units * problem.key_heads() < kMaxCacheWork) return std::nullopt;
  return c10::str("queries times the slots of a row must be fewer on CUDA: tiles of ", kCacheTileRows,
                  " query heads times ", kCacheUnitKeys, " slots must number less than ", kMaxCacheWork, "; got ",
                  tiles, " tiles for each of ", problem.key_heads(), " heads, and rows of ", problem.capacity(),
                  " slots");
}

constexpr ConstraintOn<KvCacheProblem> kConstraints[] = {
    has_kernel,          supported_dtype,       no_gradient,          supported_cuda_device, supported_cuda_dtype,
    supported_cuda_dims, aligned_cuda_caches,   supported_cuda_pages, rows_fit_cuda_kernels, countable_cuda_work,
    no_empty_tensor,     no_function_transform, no_forward_mode_ad};

}  // namespace

const KvCacheBackend& flash_kv_cache_backend() {
  static const KvCacheBackend backend{Backend::kFlash, kConstraints, flash_attention_kv_cache};
  return backend;
}

}  // namespace selfattn
