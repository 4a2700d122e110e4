// Context parallelism from C++: the layout of each rank, and attention over rows that no document makes a group need.
#include <gtest/gtest.h>
#include <selfattn/selfattn.h>
#include <torch/torch.h>

namespace {

TEST(ContextParallel, RanksHoldEveryTokenOnce) {
  const torch::Tensor ids = torch::tensor({{0, 0, 0, 0, 0, 0, 1, 1, 2, -1}}, torch::kInt);
  const auto options = selfattn::ContextLayoutOptions().balance("head_tail").bucket(4);
  std::vector<torch::Tensor> indices;
  for (int64_t rank = 0; rank < 2; ++rank) {
    const selfattn::ContextLayout layout = selfattn::context_layout(ids, rank, 2, options);
    indices.push_back(layout.indices);
    EXPECT_EQ(layout.shared, 4);  // of document 0, which has three tokens on each, rounded up
    EXPECT_TRUE(layout.documents_are_runs);
    EXPECT_TRUE(layout.segment_ids.equal(ids.gather(1, layout.indices)));
  }
  EXPECT_TRUE(std::get<0>(torch::cat(indices, 1).sort(1)).equal(torch::arange(10).unsqueeze(0)));
}

TEST(ContextParallel, WholeDocumentsNeedNoGroup) {
  const torch::Tensor ids = torch::tensor({{0, 0, 0, 1, 1, -1}, {2, 0, 2, 0, 0, 3}}, torch::kLong);
  const auto make = [](int64_t heads) { return torch::randn({2, 6, heads, 8}).requires_grad_(); };
  const torch::Tensor q = make(4), k = make(2), v = make(2);
  const selfattn::ContextLayout layout = selfattn::context_layout(ids, 0, 1);
  const auto shard = [&](const torch::Tensor& tensor) {
    return tensor.take_along_dim(layout.indices.unsqueeze(2).unsqueeze(3), 1);
  };
  const torch::Tensor out = selfattn::context_parallel_attention(
      shard(q), shard(k), shard(v), selfattn::ContextParallelOptions(layout).window_left(2));
  const torch::Tensor expected =
      selfattn::multihead_attention(q, k, v, selfattn::AttentionOptions().segment_ids(ids).window_left(2));
  EXPECT_TRUE(out.allclose(shard(expected), 1e-5, 1e-6));
  const auto grads = torch::autograd::grad({out.square().sum()}, {q, k, v});
  const auto expected_grads = torch::autograd::grad({expected.square().sum()}, {q, k, v});
  for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(grads[i].allclose(expected_grads[i], 1e-4, 1e-5));
}

TEST(ContextParallel, HeadsThatAGroupCannotShareAreNamed) {
  const torch::Tensor q = torch::randn({1, 2, 4, 8});
  const torch::Tensor ids = torch::zeros({1, 2}, torch::kInt), gathered = torch::zeros({1, 6}, torch::kInt);
  auto options = selfattn::ContextParallelOptions().segment_ids(ids).positions(ids).shared(1).group_size(2);
  options.kv_segment_ids(gathered).kv_positions(gathered).heads_group_name("node").heads_group_size(3);
  try {
    selfattn::context_parallel_attention(q, q, q, options);
    FAIL() << "expected an error";
  } catch (const c10::ValueError& error) {
    EXPECT_NE(std::string(error.what()).find("heads_group_size that divides the 4 query heads"), std::string::npos);
  }
}

}  // namespace
