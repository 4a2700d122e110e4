// Promise: while an SdpaOverride lives, PyTorch's flash attention operators are selfattn's; what it cannot serve, and
// all that comes after it, reaches the kernels of before. On the CPU, where PyTorch has none, stand-ins are those.
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/record_function.h>
#include <gtest/gtest.h>
#include <selfattn/selfattn.h>
#include <torch/library.h>
#include <torch/torch.h>

#include <type_traits>

#include "reference.h"

namespace {

using selfattn::SdpaOverride;

static_assert(!std::is_copy_constructible_v<SdpaOverride> && !std::is_copy_assignable_v<SdpaOverride>);
static_assert(std::is_nothrow_move_constructible_v<SdpaOverride> && std::is_nothrow_move_assignable_v<SdpaOverride>);

constexpr const char* kOperators[] = {"_flash_attention_forward", "_flash_attention_backward",
                                      "_scaled_dot_product_flash_attention",
                                      "_scaled_dot_product_flash_attention_backward"};

/// Kernels for the CPU that say how often they are called, and with what, and give zeros.
class StandIns {
 public:
  StandIns() : library_(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__) {
    for (const char* name : kOperators) library_.impl(name, torch::CppFunction::makeFromBoxedFunction<call>());
  }

  static inline int64_t calls = 0;
  static inline torch::jit::Stack arguments;

 private:
  static void call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    ++calls;
    arguments = *stack;
    stack->clear();
    for (const auto& result : op.schema().returns()) {
      const bool is_tensor = *result.type() == *c10::TensorType::get();
      stack->push_back(is_tensor ? c10::IValue(torch::zeros({1})) : c10::IValue(0));
    }
  }

  torch::Library library_;
};

void raise(const c10::OperatorHandle&, torch::jit::Stack*) { throw std::runtime_error("stand-in"); }

/// How often an operator runs in this thread.
class CallCounter {
 public:
  explicit CallCounter(const char* name) : callback_(at::addThreadLocalCallback(at::RecordFunctionCallback(count))) {
    wanted = name, calls = 0;
  }
  ~CallCounter() { at::removeCallback(callback_); }

  static inline std::string wanted;
  static inline int64_t calls = 0;

 private:
  static std::unique_ptr<at::ObserverContext> count(const at::RecordFunction& function) {
    calls += wanted == function.name();
    return nullptr;
  }

  at::CallbackHandle callback_;
};

/// (B, H, S, D)
torch::Tensor heads(int64_t num_heads, int64_t length, torch::Dtype dtype = torch::kFloat) {
  return torch::randn({2, length, num_heads, 16}).to(dtype).transpose(1, 2);
}

class SdpaOverrideTest : public testing::Test {
 protected:
  void SetUp() override { StandIns::calls = 0, StandIns::arguments.clear(); }
  void TearDown() override { StandIns::arguments.clear(); }

  /// 1 where a call of `dropout` reaches a stand-in, 0 where selfattn serves it.
  static int64_t calls_of_stand_ins(double dropout = 0.0) {
    const int64_t before = StandIns::calls;
    const torch::Tensor q = heads(2, 5);
    at::_scaled_dot_product_flash_attention(q, q, q, dropout);
    return StandIns::calls - before;
  }

  StandIns stand_ins;
};

TEST_F(SdpaOverrideTest, ServesTheFormula) {
  const SdpaOverride active(c10::DispatchKey::CPU);
  for (const bool is_causal : {true, false}) {
    const torch::Tensor q = heads(4, 9), k = heads(2, 9), v = heads(2, 9);
    const CallCounter counter("selfattn::flash_attention");
    const auto [out, lse, cum_q, cum_k, max_q, max_k, state, offset, debug] =
        at::_scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal);
    EXPECT_EQ(CallCounter::calls, 1);
    EXPECT_EQ(StandIns::calls, 0);
    const auto expected = loop_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), {}, is_causal);
    EXPECT_TRUE(torch::allclose(out.to(torch::kDouble), expected.transpose(1, 2), 1e-5, 1e-6));
    EXPECT_EQ(out.strides(), q.strides());
    EXPECT_EQ(lse.sizes(), (std::vector<int64_t>{2, 4, 9}));
    EXPECT_FALSE(cum_q.defined() || cum_k.defined());
    EXPECT_TRUE(max_q == 9 && max_k == 9);
    EXPECT_TRUE(state.sizes() == std::vector<int64_t>{2} && state.scalar_type() == at::kUInt64);
    EXPECT_TRUE(offset.dim() == 0 && debug.numel() == 0);
  }
}

TEST_F(SdpaOverrideTest, ServesTheGradient) {
  const SdpaOverride active(c10::DispatchKey::CPU);
  const auto run = [](torch::Dtype dtype, const std::vector<torch::Tensor>& inputs, const auto& attend) {
    std::vector<torch::Tensor> leaves;
    for (const auto& input : inputs) leaves.push_back(input.detach().to(dtype).requires_grad_());
    const torch::Tensor out = attend(leaves[0], leaves[1], leaves[2]);
    (out * torch::linspace(-1, 1, 16, out.options().requires_grad(false))).sum().backward();
    return std::vector<torch::Tensor>{leaves[0].grad(), leaves[1].grad(), leaves[2].grad()};
  };
  const std::vector<torch::Tensor> inputs = {heads(4, 7), heads(2, 7), heads(2, 7)};
  const CallCounter counter("selfattn::flash_attention_backward");
  const auto actual = run(torch::kFloat, inputs, [](const auto& q, const auto& k, const auto& v) {
    return std::get<0>(at::_scaled_dot_product_flash_attention(q, k, v, 0.0, true));
  });
  EXPECT_EQ(CallCounter::calls, 1);
  EXPECT_EQ(StandIns::calls, 0);
  const auto expected = run(torch::kDouble, inputs, [](const auto& q, const auto& k, const auto& v) {
    const auto scores = torch::matmul(q, k.repeat_interleave(2, 1).mT()) / 4.0;
    const auto masked = scores.masked_fill(torch::ones({7, 7}, torch::kBool).tril().logical_not(), -INFINITY);
    return torch::matmul(masked.softmax(-1), v.repeat_interleave(2, 1));
  });
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(torch::allclose(actual[i].to(torch::kDouble), expected[i], 1e-4, 1e-5)) << i;
    EXPECT_EQ(actual[i].strides(), inputs[i].strides()) << i;
  }
}

TEST_F(SdpaOverrideTest, ServesDocumentsByTheirLengths) {
  const SdpaOverride active(c10::DispatchKey::CPU);
  const auto x = torch::randn({9, 2, 16});
  const auto lengths = torch::tensor({0, 4, 5, 9}, torch::kInt);
  const auto ids = selfattn::segment_ids_from_cu_seqlens(lengths, 9);
  const auto [out, lse, state, offset, debug] =
      at::_flash_attention_forward(x, x, x, lengths, lengths, 4, 4, 0.0, true, false);
  const auto row = x.unsqueeze(0);
  const auto expected = loop_attention(row, row, row, ids.unsqueeze(0), true).squeeze(0);
  EXPECT_TRUE(torch::allclose(out.to(torch::kDouble), expected, 1e-5, 1e-6));
  EXPECT_EQ(lse.sizes(), (std::vector<int64_t>{2, 9}));
  EXPECT_EQ(StandIns::calls, 0);
}

TEST_F(SdpaOverrideTest, GivesRowsWithoutKeysAnInfiniteLse) {
  const SdpaOverride active(c10::DispatchKey::CPU);
  const auto q = heads(2, 5), k = heads(2, 3);
  const auto lse = std::get<1>(at::_scaled_dot_product_flash_attention(q, k, k, 0.0, true));
  EXPECT_TRUE((lse.narrow(2, 0, 2) == INFINITY).all().item<bool>());
  EXPECT_TRUE(lse.narrow(2, 2, 3).isfinite().all().item<bool>());
}

TEST_F(SdpaOverrideTest, HandsOnWhatItCannotServe) {
  const SdpaOverride active(c10::DispatchKey::CPU);
  const torch::Tensor q = heads(2, 5), wide = heads(2, 5, torch::kDouble);
  at::_scaled_dot_product_flash_attention(q, q, q, 0.25, true, false, 0.5);
  EXPECT_EQ(StandIns::calls, 1);
  ASSERT_EQ(StandIns::arguments.size(), 7u);
  EXPECT_TRUE(StandIns::arguments[0].toTensor().is_same(q));
  EXPECT_EQ(StandIns::arguments[3].toDouble(), 0.25);
  EXPECT_TRUE(StandIns::arguments[4].toBool());
  EXPECT_EQ(StandIns::arguments[6].toDouble(), 0.5);
  at::_scaled_dot_product_flash_attention(wide, wide, wide);  // flash has no float64
  EXPECT_EQ(StandIns::calls, 2);
  at::_scaled_dot_product_flash_attention_backward(q, q, q, q, q, torch::zeros({2, 2, 5}), {}, {}, 5, 5, 0.25, true,
                                                   torch::zeros({2}), torch::zeros({}));
  EXPECT_EQ(StandIns::calls, 3);
}

TEST_F(SdpaOverrideTest, RestoresTheKernelsOfBefore) {
  EXPECT_EQ(calls_of_stand_ins(), 1);
  {
    const SdpaOverride active(c10::DispatchKey::CPU);
    EXPECT_EQ(calls_of_stand_ins(), 0);
  }
  EXPECT_EQ(calls_of_stand_ins(), 1);
}

TEST_F(SdpaOverrideTest, MovesWithItsObject) {
  std::optional<SdpaOverride> first(std::in_place, c10::DispatchKey::CPU);
  SdpaOverride second(std::move(*first));
  first.reset();
  EXPECT_EQ(calls_of_stand_ins(), 0);
  {
    const SdpaOverride third(std::move(second));
  }
  EXPECT_EQ(calls_of_stand_ins(), 1);
}

TEST_F(SdpaOverrideTest, EndsInAnyOrder) {
  for (const bool is_older_first : {true, false}) {
    std::optional<SdpaOverride> older(std::in_place, c10::DispatchKey::CPU);
    std::optional<SdpaOverride> newer(std::in_place, c10::DispatchKey::CPU);
    (is_older_first ? older : newer).reset();
    EXPECT_EQ(calls_of_stand_ins(), 0);
    EXPECT_EQ(calls_of_stand_ins(/*dropout=*/0.5), 1);
    (is_older_first ? newer : older).reset();
    EXPECT_EQ(calls_of_stand_ins(), 1);
  }
}

TEST_F(SdpaOverrideTest, LeavesALaterImplementationAlone) {
  std::optional<SdpaOverride> active(std::in_place, c10::DispatchKey::CPU);
  const StandIns later;
  EXPECT_EQ(calls_of_stand_ins(), 1);
  const SdpaOverride newest(c10::DispatchKey::CPU);
  active.reset();
  EXPECT_EQ(calls_of_stand_ins(), 0);
  EXPECT_EQ(calls_of_stand_ins(/*dropout=*/0.5), 1);
}

TEST_F(SdpaOverrideTest, SaysWhereTheKernelsOfBeforeAreGone) {
  auto before = std::make_unique<StandIns>();
  const SdpaOverride active(c10::DispatchKey::CPU);
  before.reset();
  EXPECT_EQ(calls_of_stand_ins(), 0);
  EXPECT_THROW(calls_of_stand_ins(/*dropout=*/0.5), c10::Error);
}

TEST_F(SdpaOverrideTest, GoesOnAfterAnError) {
  const SdpaOverride active(c10::DispatchKey::CPU);
  const torch::Tensor q = heads(2, 5), k = heads(2, 5, torch::kBFloat16);
  EXPECT_THROW(at::_scaled_dot_product_flash_attention(q, k, k), c10::TypeError);
  EXPECT_EQ(calls_of_stand_ins(), 0);
}

TEST(SdpaOverride, RefusesADeviceWithoutKernelsAndChangesNothing) {
  try {
    const SdpaOverride active(c10::DispatchKey::CPU);
    FAIL() << "no error";
  } catch (const c10::NotImplementedError& error) {
    EXPECT_NE(std::string(error.what()).find("must have a kernel of aten::_flash_attention_forward for CPU"),
              std::string::npos)
        << error.what();
  }
  const torch::Tensor q = heads(2, 5);
  EXPECT_THROW(at::_scaled_dot_product_flash_attention(q, q, q), c10::NotImplementedError);
  {
    // Not even a part, where the fourth operator alone has none.
    torch::Library three(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
    for (const char* name : {kOperators[0], kOperators[1], kOperators[2]}) {
      three.impl(name, torch::CppFunction::makeFromBoxedFunction<raise>());
    }
    EXPECT_THROW(SdpaOverride active(c10::DispatchKey::CPU), c10::NotImplementedError);
    EXPECT_THROW(at::_scaled_dot_product_flash_attention(q, q, q), std::runtime_error);
  }
}

TEST(SdpaOverride, ReplacesKernelsForCuda) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::_flash_attention_forward", "");
  if (!op.hasKernelForDispatchKey(c10::DispatchKey::CUDA)) {
    EXPECT_THROW(SdpaOverride active, c10::NotImplementedError);
    return;
  }
  const auto kernel = [&] { return op.getComputedKernelForDispatchKey(c10::DispatchKey::CUDA).debug(); };
  const std::string before = kernel();
  {
    const torch::Tensor q = heads(4, 9), k = heads(4, 9), v = heads(4, 9);
    selfattn::SdpaOverride active;  // until it is destroyed
    at::scaled_dot_product_attention(q, k, v, {}, 0.0, /*is_causal=*/true);
    EXPECT_NE(kernel().find("SdpaOverride"), std::string::npos) << kernel();
  }
  EXPECT_EQ(kernel(), before);
}

}  // namespace
