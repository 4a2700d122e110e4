// How float32 operands are multiplied, by the names of PyTorch's switch (torch.backends.cuda.matmul.fp32_precision).
#pragma once

namespace selfattn::cuda::float32 {

enum class Precision { kIeee, kTf32 };

}  // namespace selfattn::cuda::float32
