// A LibTorch application: one SelfAttention, trained on packed rows, saved as TorchScript. No Python anywhere.
//
//   train MODULE.pt TENSORS.pt
//
// MODULE gets the module; TENSORS x, segment ids, the output, the gradient of q_proj.weight for output^2, and the loss
// of every training step. It verifies itself: the loss falls, documents stay apart, and the program exits with 1 where
// one does not hold.
#include <selfattn/selfattn.h>
#include <torch/torch.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <vector>

namespace {

/// Three documents and two tokens of padding in a row of 16 tokens.
torch::Tensor packed_ids(int64_t batch) {
  return torch::tensor({{0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, -1, -1}}, torch::kInt32).repeat({batch, 1});
}

void require(bool holds, const char* what) {
  std::cout << (holds ? "ok      " : "FAILED  ") << what << "\n";
  if (!holds) std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: train MODULE.pt TENSORS.pt\n";
    return 2;
  }
  torch::manual_seed(0);
  selfattn::SelfAttention attention(selfattn::SelfAttentionOptions(64).head_dim(16).num_kv_heads(2).qk_norm(true));
  std::cout << *attention << "\n";

  // Each token shall give the mean of its document's tokens so far: something that only attention can do.
  const torch::Tensor ids = packed_ids(8), x = torch::randn({8, 16, 64});
  const torch::Tensor allowed = selfattn::segment_mask(ids).squeeze(1).tril().to(torch::kFloat32);
  const torch::Tensor target = torch::bmm(allowed, x) / allowed.sum(-1, true).clamp_min(1.0);
  const torch::Tensor is_token = (ids >= 0).unsqueeze(-1);
  torch::optim::Adam optimizer(attention->parameters(), torch::optim::AdamOptions(3e-3));
  std::vector<torch::Tensor> losses;
  for (int step = 0; step < 200; ++step) {
    optimizer.zero_grad();
    const torch::Tensor loss = ((attention->forward(x, {}, {}, ids) - target) * is_token).square().mean();
    loss.backward();
    optimizer.step();
    losses.push_back(loss.detach());
  }
  const double first = losses.front().item<double>(), last = losses.back().item<double>();
  std::cout << "loss " << first << " -> " << last << "\n";
  require(last < 0.5 * first, "the loss falls to less than half");

  torch::Tensor changed = x.clone();
  changed.narrow(1, 0, 5).normal_();  // the first document of every row
  const torch::Tensor before = attention->forward(x, {}, {}, ids), after = attention->forward(changed, {}, {}, ids);
  require(torch::equal(before.narrow(1, 5, 11), after.narrow(1, 5, 11)),
          "a changed document leaves the others as they are");

  attention->zero_grad();
  before.square().sum().backward();
  selfattn::to_torchscript(attention).save(argv[1]);
  const std::vector<char> tensors = torch::pickle_save(c10::ivalue::Tuple::create(
      x, ids, before.detach(), attention->q_proj->weight.grad(), torch::stack(losses)));  // as torch.save writes it
  std::ofstream(argv[2], std::ios::binary).write(tensors.data(), static_cast<std::streamsize>(tensors.size()));
  std::cout << "wrote " << argv[1] << " and " << argv[2] << "\n";
  return 0;
}
