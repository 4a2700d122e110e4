// Promise: in C++, too, a layer over a cache gives in pieces what its whole forward pass gives, and pages go to whom
// they are given.
#include <gtest/gtest.h>
#include <selfattn/selfattn.h>
#include <torch/torch.h>

#include "reference.h"

namespace {

constexpr int64_t kRows = 3, kLength = 11, kHeads = 2, kHeadDim = 8;

selfattn::SelfAttention make_layer(const std::function<void(selfattn::SelfAttentionOptions&)>& change = {}) {
  selfattn::SelfAttentionOptions options(48);
  options.head_dim(kHeadDim).num_kv_heads(kHeads).qk_norm(true).window_left(6);
  if (change) change(options);
  selfattn::SelfAttention layer(options);
  layer->to(torch::kDouble);
  layer->eval();
  return layer;
}

selfattn::KVCacheOptions options() { return selfattn::KVCacheOptions(1, kHeads, kHeadDim).dtype(torch::kDouble); }

selfattn::KVCache paged() {
  auto cache = selfattn::KVCache::paged(options(), 9, 4, kRows, kLength);
  selfattn::PageAllocator allocator(cache);
  for (int64_t row = 0; row < kRows; ++row) allocator.reserve(row, kLength);
  return cache;
}

template <typename Run>
torch::Tensor in_pieces(selfattn::KVCache cache, const torch::Tensor& x, const Run& run) {
  torch::NoGradGuard no_grad;
  std::vector<torch::Tensor> outs;
  for (const torch::Tensor& piece : x.split_with_sizes({4, 1, 1, 5}, 1)) {
    outs.push_back(run(piece, cache.layer(0)));
    cache.advance(piece.size(1));
  }
  return torch::cat(outs, 1);
}

TEST(KVCache, PiecesEqualTheWhole) {
  const auto x = torch::randn({kRows, kLength, 48}, torch::kDouble);
  for (auto layer : {make_layer(), make_layer([](auto& of) { of.rotary_dim(4).rope_pairing("half"); }),
                     make_layer([](auto& of) { of.qk_norm_scope("projection").sinks(true); })}) {
    const auto run = [&](const torch::Tensor& piece, const selfattn::KVCacheLayer& cache) {
      return layer->forward_with_cache(piece, cache);
    };
    EXPECT_TRUE(torch::allclose(in_pieces(selfattn::KVCache::dense(options(), kRows, kLength), x, run),
                                layer->forward(x), 1e-6, 1e-8));
    EXPECT_TRUE(torch::allclose(in_pieces(paged(), x, run), layer->forward(x), 1e-6, 1e-8));
  }
}

TEST(KVCache, RunsTheGuide) {
  selfattn::SelfAttention layer(selfattn::SelfAttentionOptions(64).head_dim(16).num_kv_heads(2));
  const auto x = torch::randn({3, 5, 64});
  auto cache = selfattn::KVCache::dense(selfattn::KVCacheOptions(/*layers=*/2, /*num_kv_heads=*/2, /*head_dim=*/16),
                                        /*batch=*/3, /*max_length=*/32);
  torch::NoGradGuard no_grad;
  torch::Tensor y = layer->forward_with_cache(x, cache.layer(0));
  cache.advance(x.size(1));
  EXPECT_TRUE(torch::allclose(y, layer->forward(x), 1e-4, 1e-5));
  EXPECT_TRUE(cache.lengths().eq(5).all().item<bool>());
}

TEST(KVCache, ServesAScriptedLayer) {
  const auto x = torch::randn({kRows, kLength, 48}, torch::kDouble);
  for (auto layer : {make_layer(), make_layer([](auto& of) { of.rotary_dim(4); }),
                     make_layer([](auto& of) { of.qk_norm_scope("projection"); })}) {
    auto script = selfattn::to_torchscript(layer);
    const auto run = [&](const torch::Tensor& piece, const selfattn::KVCacheLayer& cache) {
      const auto tensors = c10::ivalue::Tuple::create(
          cache.keys, cache.values, cache.lengths, cache.page_table ? c10::IValue(*cache.page_table) : c10::IValue());
      return script.forward({piece}, {{"cache", tensors}}).toTensor();
    };
    EXPECT_TRUE(torch::allclose(in_pieces(paged(), x, run), layer->forward(x), 1e-6, 1e-8));
  }
}

TEST(KVCache, NeedsALengthForFrequenciesThatDependOnOne) {
  torch::NoGradGuard no_grad;
  const auto x = torch::randn({kRows, 1, 48}, torch::kDouble);
  const auto cache = selfattn::KVCache::dense(options(), kRows, kLength).layer(0);
  auto layer = make_layer([](auto& of) {
    of.rope_scaling(
        selfattn::RopeParameters(kHeadDim).rope_type("dynamic").factor(2.0).original_max_position_embeddings(4));
  });
  EXPECT_THROW(layer->forward_with_cache(x, cache), c10::ValueError);
  const auto tensors = c10::ivalue::Tuple::create(cache.keys, cache.values, cache.lengths, c10::IValue());
  EXPECT_ANY_THROW(selfattn::to_torchscript(layer).forward({x}, {{"cache", tensors}}));
}

TEST(KVCache, OperatorsWriteAndRead) {
  const auto of = torch::dtype(torch::kDouble);
  const auto q = torch::randn({2, 5, 4, 8}, of), k = torch::randn({2, 5, 2, 8}, of), v = torch::randn({2, 5, 2, 8}, of);
  const auto keys = torch::zeros({2, 6, 2, 8}, of), values = torch::zeros({2, 6, 2, 8}, of);
  const auto lengths = selfattn::lengths_after_append(torch::zeros({2}, torch::kInt), {}, 5);
  selfattn::append_kv_cache(k, v, selfattn::kv_cache_positions(lengths, {}, 5, 6), keys, values);
  const auto [out, lse] = selfattn::attention_with_kv_cache_lse(q, keys, values, lengths);
  EXPECT_TRUE(torch::allclose(out, selfattn::multihead_attention(q, k, v), 1e-6, 1e-8));
  EXPECT_TRUE(torch::allclose(selfattn::attention_with_kv_cache(q, keys, values, lengths), out, 1e-6, 1e-8));
  EXPECT_NE(selfattn::explain_kv_cache_backend(q, keys, values, lengths).find("chosen"), std::string::npos);
  EXPECT_THROW(selfattn::attention_with_kv_cache(q, keys, values, lengths + 2), c10::ValueError);
  EXPECT_THROW(
      selfattn::attention_with_kv_cache(q, keys, values, lengths, selfattn::KVCacheAttentionOptions().split_keys(3)),
      c10::ValueError);
}

TEST(KVCache, RefusesAGradient) {
  auto layer = make_layer();
  const auto cache = selfattn::KVCache::dense(options(), kRows, kLength);
  EXPECT_THROW(layer->forward_with_cache(torch::randn({kRows, 1, 48}, torch::kDouble), cache.layer(0)), c10::Error);
}

TEST(PageAllocator, SharesReordersAndReleases) {
  auto cache = selfattn::KVCache::paged(options(), 6, 4, kRows, kLength);
  selfattn::PageAllocator allocator(cache);
  allocator.reserve(0, 10);
  cache.advance(torch::tensor({10, 0, 0}, torch::kInt));
  EXPECT_EQ(allocator.share(0, 1, 7), 4);
  EXPECT_EQ(allocator.free_pages(), 3);
  EXPECT_TRUE(cache.lengths().equal(torch::tensor({10, 4, 0}, torch::kInt)));
  EXPECT_THROW(allocator.reserve(2, 13), c10::ValueError);
  EXPECT_THROW(allocator.reserve(3, 1), c10::ValueError);
  allocator.reserve(2, 12);
  EXPECT_THROW(allocator.reserve(1, 5), c10::Error);  // out of pages
  allocator.release(2);
  cache.layer(0).keys.copy_(torch::randn({6, 4, kHeads, kHeadDim}, torch::kDouble));
  const auto last_page = [&](int64_t row) {
    return cache.layer(0).keys[(*cache.page_table())[row][2].item<int64_t>()];
  };
  const auto expected = last_page(0).clone();
  allocator.reorder(torch::tensor({0, 0, 1}));
  EXPECT_EQ(allocator.free_pages(), 2);  // two full pages are shared, the last one is copied
  EXPECT_TRUE(cache.lengths().equal(torch::tensor({10, 10, 4}, torch::kInt)));
  EXPECT_TRUE(last_page(0).equal(expected) && last_page(1).equal(expected));
  EXPECT_NE(last_page(0).data_ptr(), last_page(1).data_ptr());
  for (int64_t row = 0; row < kRows; ++row) allocator.release(row);
  EXPECT_EQ(allocator.free_pages(), 6);
}

}  // namespace
