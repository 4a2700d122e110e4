// Promise: bad input raises the right kind of error, and the message names the argument.
#include <gtest/gtest.h>
#include <selfattn/selfattn.h>
#include <torch/torch.h>

namespace {

using selfattn::AttentionOptions;

template <typename Error, typename Call>
void expect_error(Call call, const std::string& words) {
  try {
    call();
    FAIL() << "no error; expected one with: " << words;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what_without_backtrace()).find(words), std::string::npos) << error.what();
  }
}

const auto q = torch::randn({1, 4, 2, 8});

TEST(Errors, NameAnUnknownBackend) {
  expect_error<c10::ValueError>([] { selfattn::multihead_attention(q, q, q, AttentionOptions().backend("fast")); },
                                "backend must be one of");
}

TEST(Errors, GiveEveryReasonOfABackendThatCannotServe) {
  const auto call = [] { selfattn::multihead_attention(q, q, q, AttentionOptions().backend("cudnn").softcap(2.0)); };
  expect_error<c10::NotImplementedError>(call, "q must be on a CUDA device; got cpu");
  expect_error<c10::NotImplementedError>(call, "softcap must be 0; got 2");
}

TEST(Errors, NameTheArgumentOfAWrongDtypeOrShape) {
  expect_error<c10::TypeError>([] { selfattn::multihead_attention(q, q.to(torch::kDouble), q); },
                               "k must have the dtype");
  expect_error<c10::ValueError>([] { selfattn::multihead_attention(q, q, q.narrow(1, 0, 3)); }, "v must have the");
  expect_error<c10::ValueError>(
      [] {
        selfattn::multihead_attention(q, q, q, AttentionOptions().segment_ids(torch::zeros({1, 3}, torch::kInt32)));
      },
      "segment_ids must have the shape");
}

TEST(Errors, NameTheOptionOfAModule) {
  expect_error<c10::ValueError>([] { selfattn::SelfAttention(selfattn::SelfAttentionOptions(100)); }, "embedding_dim");
  expect_error<c10::ValueError>([] { selfattn::SelfAttention(selfattn::SelfAttentionOptions(128).num_kv_heads(3)); },
                                "num_kv_heads");
  expect_error<c10::ValueError>(
      [] { selfattn::SelfAttention(selfattn::SelfAttentionOptions(128).attention_backend("fast")); }, "backend");
}

}  // namespace
