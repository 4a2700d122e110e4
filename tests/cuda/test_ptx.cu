// Every wrapper of csrc/cuda/ptx on the GPU against a scalar computation on the host, on random data, exactly.
// Builds alone: nvcc -std=c++20 -gencode=arch=compute_90a,code=sm_90a tests/cuda/test_ptx.cu
// csrc/cuda/flash/tensor_map.cu
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

#include "flash/tensor_map.h"
#include "ptx/arithmetic.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/fence.cuh"
#include "ptx/launch.cuh"
#include "ptx/matrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma_tf32.cuh"
#include "ptx/reduce.cuh"
#include "ptx/register.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

using namespace selfattn;

namespace {

int failures = 0;

void cuda_check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::printf("CUDA error: %s\n", cudaGetErrorString(status));
  std::exit(1);
}

void report(const char* name, long long wrong) {
  failures += wrong != 0;
  if (wrong) std::printf("FAILED %s: %lld wrong\n", name, wrong);
}

// Device memory that starts as the host's values and can be read back.
template <class T>
struct Array {
  T* device;
  size_t count;
  explicit Array(const std::vector<T>& values) : count(values.size()) {
    cuda_check(cudaMalloc(&device, count * sizeof(T)));
    cuda_check(cudaMemcpy(device, values.data(), count * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Array() { cudaFree(device); }
  std::vector<T> read() const {
    std::vector<T> values(count);
    cuda_check(cudaGetLastError());
    cuda_check(cudaMemcpy(values.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }
};

template <class Element>
Element small_integer() {
  return static_cast<Element>(static_cast<float>(std::rand() % 17 - 8));
}

// ------------------------------------------------------------------------------------------------ wgmma
constexpr int kDepth = 64;  // of the products: one panel, four k-steps

// Element (r, c) of a row-major matrix goes to swizzled panels of 64 columns.
template <class Element>
__device__ void fill_panels(Element* s_panels, const Element* g_matrix, int rows, int columns) {
  for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
    const int r = i / columns, c = i % columns, panel = c / 64, chunk = c % 64 / 8;
    s_panels[panel * rows * 64 + r * 64 + ((chunk ^ (r % 8)) * 8) + c % 8] = g_matrix[i];
  }
}

// d (64 x N): A B, or A B + 1 where the form adds. A is 64 x kDepth (kDepth x 64 transposed), B N x kDepth (kDepth x
// N).
template <class Element, int N, bool kFromRegisters, bool kTransposeA, bool kTransposeB, bool kOverwrites>
__global__ void __launch_bounds__(128) product_kernel(const Element* g_a, const Element* g_b, float* g_d) {
  extern __shared__ __align__(1024) unsigned char s_memory[];
  Element *s_a = reinterpret_cast<Element*>(s_memory), *s_b = s_a + 64 * kDepth;
  kTransposeA ? fill_panels(s_a, g_a, kDepth, 64) : fill_panels(s_a, g_a, 64, kDepth);
  kTransposeB ? fill_panels(s_b, g_b, kDepth, N) : fill_panels(s_b, g_b, N, kDepth);
  ptx::fence_proxy_async_shared();
  __syncthreads();
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);
  uint32_t a[kDepth / 4];
  for (int k = 0; k < kDepth / 16; k++)
    for (int i = 0; i < 4; i++)
      a[4 * k + i] = *reinterpret_cast<const uint32_t*>(&g_a[(row + i % 2 * 8) * kDepth + k * 16 + column + i / 2 * 8]);
  float d[N / 2];
  for (float& x : d) x = 1.f;
  const uint32_t a_address = ptx::shared_address(s_a), b_address = ptx::shared_address(s_b);
  using Product = ptx::Wgmma<Element, N>;
  ptx::pin(d);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++) {
    const uint64_t left = ptx::matrix_descriptor(a_address + k * (kTransposeA ? 2048 : 32), kDepth * 128);
    const uint64_t right = ptx::matrix_descriptor(b_address + k * (kTransposeB ? 2048 : 32), kDepth * 128);
    if constexpr (kFromRegisters) {
      if (k == 0 && kOverwrites)
        Product::template rs_overwrite<kTransposeB>(d, a, right);
      else
        Product::template rs<kTransposeB>(d, a + 4 * k, right);
    } else {
      if (k == 0 && kOverwrites)
        Product::template ss_overwrite<kTransposeA, kTransposeB>(d, left, right);
      else
        Product::template ss<kTransposeA, kTransposeB>(d, left, right);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::pin(d);
  for (int i = 0; i < N / 2; i++) g_d[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2] = d[i];
}

template <class Element, int N, bool kFromRegisters, bool kTransposeA, bool kTransposeB, bool kOverwrites>
void test_product() {
  std::vector<Element> a(64 * kDepth), b(N * kDepth);
  for (auto& x : a) x = small_integer<Element>();
  for (auto& x : b) x = small_integer<Element>();
  Array<Element> g_a(a), g_b(b);
  Array<float> g_d(std::vector<float>(64 * N, -1.f));
  const auto kernel = product_kernel<Element, N, kFromRegisters, kTransposeA, kTransposeB, kOverwrites>;
  const int bytes = (64 + (N + 63) / 64 * 64) * kDepth * 2;
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<1, 128, bytes>>>(g_a.device, g_b.device, g_d.device);
  const std::vector<float> d = g_d.read();
  long long wrong = 0;
  for (int m = 0; m < 64; m++)
    for (int n = 0; n < N; n++) {
      float sum = kOverwrites ? 0.f : 1.f;
      for (int k = 0; k < kDepth; k++)
        sum += static_cast<float>(a[kTransposeA ? k * 64 + m : m * kDepth + k]) *
               static_cast<float>(b[kTransposeB ? k * N + n : n * kDepth + k]);
      wrong += sum != d[m * N + n];
    }
  char name[96];
  std::snprintf(name, sizeof name, "wgmma n%d %s%s%s%s", N, kFromRegisters ? "rs" : "ss", kTransposeA ? " A^T" : "",
                kTransposeB ? " B^T" : "", kOverwrites ? " overwrite" : "");
  report(name, wrong);
}

template <class Element, int N>
void test_products_of_width() {
  test_product<Element, N, false, false, false, true>();
  test_product<Element, N, false, false, false, false>();
  test_product<Element, N, false, true, true, true>();
  test_product<Element, N, false, true, false, true>();
  test_product<Element, N, true, false, false, true>();
  test_product<Element, N, true, false, true, false>();
}

template <class Element>
void test_products() {
  test_products_of_width<Element, 32>();
  test_products_of_width<Element, 64>();
  test_products_of_width<Element, 80>();
  test_products_of_width<Element, 96>();
  test_products_of_width<Element, 112>();
  test_products_of_width<Element, 128>();
  test_products_of_width<Element, 192>();
  test_products_of_width<Element, 256>();
}

// ------------------------------------------------------------------------------------------------ matrix
// Four 8x8 matrices one after the other: loaded as fragments, stored to the other place, plain or transposed.
__global__ void matrix_kernel(const uint16_t* g_in, uint32_t* g_fragments, uint16_t* g_stored, bool transposes) {
  __shared__ __align__(16) uint16_t s_in[4 * 64], s_out[4 * 64];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) s_in[i] = g_in[i];
  __syncwarp();
  uint32_t r[4];
  ptx::load_matrix_x4(ptx::shared_address(s_in + lane * 8), r);
  for (int i = 0; i < 4; i++) g_fragments[lane * 4 + i] = r[i];
  const uint32_t target = ptx::shared_address(s_out + lane * 8);
  transposes ? ptx::store_matrix_x4_transposed(target, r[0], r[1], r[2], r[3])
             : ptx::store_matrix_x4(target, r[0], r[1], r[2], r[3]);
  __syncwarp();
  for (int i = lane; i < 256; i += 32) g_stored[i] = s_out[i];
}

void test_matrix(bool transposes) {
  std::vector<uint16_t> in(256);
  for (auto& x : in) x = static_cast<uint16_t>(std::rand());
  Array<uint16_t> g_in(in), g_stored(std::vector<uint16_t>(256, 0));
  Array<uint32_t> g_fragments(std::vector<uint32_t>(128, 0));
  matrix_kernel<<<1, 32>>>(g_in.device, g_fragments.device, g_stored.device, transposes);
  const auto fragments = g_fragments.read();
  const auto stored = g_stored.read();
  long long wrong = 0;
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const int at = i * 64 + lane / 4 * 8 + 2 * (lane % 4);
      wrong += fragments[lane * 4 + i] != (uint32_t(in[at]) | uint32_t(in[at + 1]) << 16);
    }
  for (int i = 0; i < 256; i++) {
    const int matrix = i / 64, row = i / 8 % 8, column = i % 8;
    wrong += stored[i] != (transposes ? in[matrix * 64 + column * 8 + row] : in[i]);
  }
  report(transposes ? "load_matrix_x4, store_matrix_x4_transposed" : "load_matrix_x4, store_matrix_x4", wrong);
}

// ------------------------------------------------------------------------------------------------ mma_tf32
// d = a b and c += a b of a (16, 8) and b (8, 8) in rows.
__global__ void tf32_kernel(const uint32_t* g_a, const uint32_t* g_b, float* g_c, float* g_d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t a[4] = {g_a[g * 8 + t], g_a[(g + 8) * 8 + t], g_a[g * 8 + t + 4], g_a[(g + 8) * 8 + t + 4]};
  const uint32_t b[2] = {g_b[t * 8 + g], g_b[(t + 4) * 8 + g]};
  const auto place = [&](int i) { return (g + i / 2 * 8) * 8 + 2 * t + i % 2; };
  float c[4], d[4];
  for (int i = 0; i < 4; i++) c[i] = g_c[place(i)];
  ptx::multiply_tf32(c, a, b[0], b[1]);
  ptx::begin_multiply_tf32(d, a, b[0], b[1]);
  for (int i = 0; i < 4; i++) g_c[place(i)] = c[i], g_d[place(i)] = d[i];
}

void test_tf32() {
  // Whole numbers, with noise in the bits that are not read.
  const auto make = [](int count, std::vector<float>& numbers) {
    std::vector<uint32_t> operand(count);
    for (int i = 0; i < count; i++) {
      numbers.push_back(float(std::rand() % 2001 - 1000));
      operand[i] = reinterpret_cast<const uint32_t&>(numbers.back()) | (std::rand() & 0x1fff);
    }
    return operand;
  };
  std::vector<float> a, b, c(128);
  for (auto& x : c) x = float(std::rand() % 1000);
  Array<uint32_t> g_a(make(128, a)), g_b(make(64, b));
  Array<float> g_c(c), g_d(c);
  tf32_kernel<<<1, 32>>>(g_a.device, g_b.device, g_c.device, g_d.device);
  const auto sum = g_c.read(), product = g_d.read();
  long long wrong = 0;
  for (int i = 0; i < 128; i++) {
    float expected = 0.f;
    for (int k = 0; k < 8; k++) expected += a[i / 8 * 8 + k] * b[k * 8 + i % 8];
    wrong += product[i] != expected;
    wrong += sum[i] != expected + c[i];
  }
  report("multiply_tf32, begin_multiply_tf32", wrong);
}

// ------------------------------------------------------------------------------------------------ copies
constexpr int kBoxRows = 32;

// Loads a box of (batch b, head h) at `row`, `column`, unswizzles it into g_box, and stores it at the same place of
// `target`.
__global__ void copy_kernel(const __grid_constant__ CUtensorMap source, const __grid_constant__ CUtensorMap target,
                            uint16_t* g_box, int column, int row, int h, int b) {
  __shared__ __align__(1024) uint16_t s_box[kBoxRows * 64];
  __shared__ __align__(8) uint64_t s_barrier;
  const uint32_t box = ptx::shared_address(s_box);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&source);
    ptx::mbarrier_init(s_barrier, 2);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(s_barrier, sizeof s_box);
    ptx::tma_load_4d(&source, s_barrier, box, column, row, h, b);
  }
  if (threadIdx.x == 32) ptx::mbarrier_arrive(s_barrier);
  ptx::mbarrier_wait(s_barrier, 0);
  for (int i = threadIdx.x; i < kBoxRows * 64; i += blockDim.x) {
    const int r = i / 64, c = i % 64;
    g_box[i] = s_box[r * 64 + ((c / 8) ^ (r % 8)) * 8 + c % 8];
  }
  ptx::barrier_sync(1, 64);
  if (threadIdx.x == 0) {
    ptx::fence_proxy_async_shared();
    ptx::tma_store_4d(&target, box, column, row, h, b);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    ptx::bulk_wait<0>();
  }
}

// dim 80 and length 50 are no multiples of the box: zeros come in, nothing goes out beyond the ends.
void test_tensor_copies() {
  constexpr int kBatch = 2, kLength = 50, kHeads = 3, kDim = 80, kPadded = 96;
  std::vector<uint16_t> in(kBatch * kLength * kHeads * kPadded);
  for (auto& x : in) x = static_cast<uint16_t>(std::rand() % 60000 + 1);
  const std::vector<uint16_t> blank(in.size(), 0xABCD);
  const auto at = [](int b, int s, int h, int d) { return ((b * kLength + s) * kHeads + h) * kPadded + d; };
  long long wrong = 0;
  for (const int column : {0, 64})
    for (const int row : {0, 32}) {
      const int h = 2, b = 1;
      Array<uint16_t> g_in(in), g_out(blank), g_box(std::vector<uint16_t>(kBoxRows * 64, 7));
      const auto map = [&](uint16_t* data) {
        return cuda::make_tensor_map({data, kLength * kHeads * kPadded, kHeads * kPadded, kPadded},
                                     cuda::ElementType::kHalf, kBatch, kLength, kHeads, kDim, kBoxRows);
      };
      copy_kernel<<<1, 64>>>(map(g_in.device), map(g_out.device), g_box.device, column, row, h, b);
      const auto box = g_box.read();
      auto expected = blank;
      for (int i = 0; i < kBoxRows * 64; i++) {
        const int s = row + i / 64, d = column + i % 64;
        const bool exists = s < kLength && d < kDim;
        wrong += box[i] != (exists ? in[at(b, s, h, d)] : 0);
        if (exists) expected[at(b, s, h, d)] = in[at(b, s, h, d)];
      }
      const auto out = g_out.read();
      for (size_t i = 0; i < out.size(); i++) wrong += out[i] != expected[i];
    }
  report("tma_load_4d, tma_store_4d", wrong);
}

__global__ void bulk_kernel(const int* g_in, int* g_out, float* g_sum) {
  __shared__ __align__(16) int s_data[256];
  __shared__ __align__(8) uint64_t s_barrier;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(s_barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int round = 0; round < 3; round++) {  // the parity turns
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect(s_barrier, sizeof s_data);
      ptx::bulk_load(s_barrier, ptx::shared_address(s_data), g_in + round * 256, sizeof s_data);
    }
    ptx::mbarrier_wait(s_barrier, round % 2);
    g_out[round * 256 + threadIdx.x] = s_data[threadIdx.x];
    ptx::fence_proxy_async_shared();
    __syncthreads();
  }
  if (threadIdx.x < 64) ptx::reduce_add_x4(g_sum + threadIdx.x % 4 * 4, 1.f, 2.f, 3.f, float(threadIdx.x));
  // Each warp sends its 32 floats out of shared memory to the second part of the sums.
  auto* s_floats = reinterpret_cast<float*>(s_data);
  s_floats[threadIdx.x] = float(threadIdx.x);
  ptx::fence_proxy_async_shared();
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    ptx::bulk_reduce_add(g_sum + 16, ptx::shared_address(s_floats + threadIdx.x), 32 * sizeof(float));
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

void test_bulk_copies() {
  std::vector<int> in(768);
  for (auto& x : in) x = std::rand();
  Array<int> g_in(in), g_out(std::vector<int>(768, 0));
  Array<float> g_sum(std::vector<float>(48, 0.5f));
  bulk_kernel<<<1, 256>>>(g_in.device, g_out.device, g_sum.device);
  long long wrong = 0;
  const auto out = g_out.read();
  for (int i = 0; i < 768; i++) wrong += out[i] != in[i];
  const auto sum = g_sum.read();
  for (int i = 0; i < 4; i++) {
    float last = 0.5f;
    for (int t = i; t < 64; t += 4) last += float(t);
    wrong += sum[4 * i] != 16.5f || sum[4 * i + 1] != 32.5f || sum[4 * i + 2] != 48.5f || sum[4 * i + 3] != last;
  }
  for (int lane = 0; lane < 32; lane++) wrong += sum[16 + lane] != 0.5f + 8 * (16 * 7 + lane);  // of 8 warps
  report("bulk_load, reduce_add_x4, bulk_reduce_add", wrong);
}

// ------------------------------------------------------------------------------------------------ threads
// Two warps hand a number back and forth over named barriers; registers move between warpgroups.
__global__ void __launch_bounds__(256, 1) barrier_kernel(int* g_out) {
  __shared__ int s_number;
  if (threadIdx.x == 0) s_number = 0;
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::lower_registers<40>();
    for (int i = 0; i < 100; i++) {
      if (threadIdx.x == 0) s_number = s_number * 3 + 1;
      ptx::barrier_arrive(1, 256);
      ptx::barrier_sync(2, 256);
    }
  } else {
    ptx::raise_registers<160>();
    for (int i = 0; i < 100; i++) {
      ptx::barrier_sync(1, 256);
      if (threadIdx.x == 128) s_number ^= i;
      ptx::barrier_arrive(2, 256);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) *g_out = s_number;
}

void test_named_barriers() {
  Array<int> g_out(std::vector<int>(1, 0));
  barrier_kernel<<<1, 256>>>(g_out.device);
  int expected = 0;
  for (int i = 0; i < 100; i++) expected = int(unsigned(expected) * 3 + 1) ^ i;
  report("barrier_sync, barrier_arrive, registers", g_out.read()[0] != expected);
}

__global__ void first_kernel(int* g_data, int count) {
  ptx::launch_dependents();
  const long long start = clock64();
  while (clock64() - start < 200000) {
  }
  for (int i = threadIdx.x; i < count; i += blockDim.x) g_data[i] = i * i;
}

__global__ void second_kernel(const int* g_data, int* g_copy, int count) {
  ptx::wait_for_previous_kernel();
  for (int i = threadIdx.x; i < count; i += blockDim.x) g_copy[i] = g_data[i];
}

void test_dependent_launch() {
  constexpr int kCount = 4096;
  Array<int> g_data(std::vector<int>(kCount, -1)), g_copy(std::vector<int>(kCount, -1));
  first_kernel<<<1, 256>>>(g_data.device, kCount);
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1), config.blockDim = dim3(256), config.attrs = &early, config.numAttrs = 1;
  cuda_check(cudaLaunchKernelEx(&config, second_kernel, static_cast<const int*>(g_data.device), g_copy.device, kCount));
  long long wrong = 0;
  const auto copy = g_copy.read();
  for (int i = 0; i < kCount; i++) wrong += copy[i] != i * i;
  report("launch_dependents, wait_for_previous_kernel", wrong);
}

// ------------------------------------------------------------------------------------------------ arithmetic
__global__ void arithmetic_kernel(const float* g_in, float* g_exp2, float* g_reciprocal, uint32_t* g_bf16,
                                  uint32_t* g_half, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    g_exp2[i] = ptx::exp2_approx(g_in[i]);
    g_reciprocal[i] = ptx::reciprocal_approx(g_in[i]);
    g_bf16[i] = ptx::pack<__nv_bfloat16>(g_in[i], -g_in[i]);
    g_half[i] = ptx::pack<__half>(g_in[i], -g_in[i]);
  }
}

void test_arithmetic() {
  constexpr int kCount = 4096;
  std::vector<float> in(kCount);
  for (auto& x : in) x = (std::rand() / float(RAND_MAX) - 0.8f) * 100.f;
  in[0] = -INFINITY;
  Array<float> g_in(in), g_exp2(in), g_reciprocal(in);
  Array<uint32_t> g_bf16(std::vector<uint32_t>(kCount, 0)), g_half(std::vector<uint32_t>(kCount, 0));
  arithmetic_kernel<<<1, 256>>>(g_in.device, g_exp2.device, g_reciprocal.device, g_bf16.device, g_half.device, kCount);
  const auto exps = g_exp2.read(), reciprocals = g_reciprocal.read();
  const auto bf16 = g_bf16.read(), half = g_half.read();
  long long wrong = exps[0] != 0.f || reciprocals[0] != 0.f;
  for (int i = 1; i < kCount; i++) {
    const double expected = std::exp2(double(in[i]));
    wrong += std::fabs(exps[i] - expected) > 1e-6 * expected;
    wrong += in[i] != 0.f && std::fabs(double(reciprocals[i]) * in[i] - 1) > 5e-7;
    const __nv_bfloat16_raw b0 = __float2bfloat16(in[i]), b1 = __float2bfloat16(-in[i]);
    const __half_raw h0 = __float2half(in[i]), h1 = __float2half(-in[i]);
    wrong += bf16[i] != (uint32_t(b0.x) | uint32_t(b1.x) << 16);
    wrong += half[i] != (uint32_t(h0.x) | uint32_t(h1.x) << 16);
  }
  report("exp2_approx, reciprocal_approx, pack", wrong);
}

// ------------------------------------------------------------------------------------------------ clusters
constexpr int kClusterBlocks = 4, kClusterThreads = 64;

// Each thread block copies its part of g_in into its own shared memory, and reads that of its right neighbour.
__global__ void __cluster_dims__(kClusterBlocks, 1, 1) cluster_kernel(const float* g_in, float* g_out, int* g_places) {
  __shared__ __align__(16) float s_part[4 * kClusterThreads];
  __shared__ __align__(8) uint64_t s_barrier;
  const int rank = ptx::cluster_rank(), blocks = ptx::cluster_blocks(), thread = static_cast<int>(threadIdx.x);
  if (thread == 0) ptx::mbarrier_init(s_barrier, kClusterThreads);
  __syncthreads();
  const float* g_part = g_in + (blockIdx.x * kClusterThreads + thread) * 4;
  ptx::copy_async(ptx::shared_address(s_part + 4 * thread), g_part, true);
  ptx::arrive_after_copies(s_barrier);
  ptx::mbarrier_wait(s_barrier, 0);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  const uint32_t place =
      ptx::address_in_block(ptx::shared_address(s_part + 4 * (kClusterThreads - 1 - thread)), (rank + 1) % blocks);
  const float4 four = ptx::load_four_of_cluster(place);
  const float2 pair = ptx::load_pair_of_cluster(place + 2 * int(sizeof(float)));
  float* g_result = g_out + (blockIdx.x * kClusterThreads + thread) * 4;
  g_result[0] = four.x, g_result[1] = four.y, g_result[2] = pair.x, g_result[3] = pair.y;
  if (four.z != pair.x || four.w != pair.y) g_result[0] = -1.f;
  if (thread == 0) g_places[2 * blockIdx.x] = rank, g_places[2 * blockIdx.x + 1] = blocks;
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

void test_clusters() {
  constexpr int kBlocks = 3 * kClusterBlocks, kCount = kBlocks * kClusterThreads * 4;
  std::vector<float> in(kCount);
  for (auto& x : in) x = float(std::rand());
  Array<float> g_in(in), g_out(std::vector<float>(kCount, 0.f));
  Array<int> g_places(std::vector<int>(2 * kBlocks, -1));
  cluster_kernel<<<kBlocks, kClusterThreads>>>(g_in.device, g_out.device, g_places.device);
  const auto out = g_out.read();
  const auto places = g_places.read();
  long long wrong = 0;
  for (int block = 0; block < kBlocks; block++) {
    const int rank = block % kClusterBlocks, neighbour = block - rank + (rank + 1) % kClusterBlocks;
    wrong += places[2 * block] != rank || places[2 * block + 1] != kClusterBlocks;
    for (int i = 0; i < kClusterThreads; i++)
      for (int j = 0; j < 4; j++)
        wrong += out[(block * kClusterThreads + i) * 4 + j] !=
                 in[(neighbour * kClusterThreads + kClusterThreads - 1 - i) * 4 + j];
  }
  report("clusters, arrive_after_copies", wrong);
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: needs a CUDA GPU, and there is none\n");
    return 77;
  }
  cudaDeviceProp device;
  cuda_check(cudaGetDeviceProperties(&device, 0));
  if (device.major != 9 || device.minor != 0) {
    std::printf("skipped: needs compute capability 9.0, and the GPU has %d.%d\n", device.major, device.minor);
    return 77;
  }
  std::srand(static_cast<unsigned>(std::rand() ^ clock()));
  test_products<__nv_bfloat16>();
  test_products<__half>();
  test_matrix(false);
  test_matrix(true);
  test_tf32();
  test_tensor_copies();
  test_bulk_copies();
  test_clusters();
  test_named_barriers();
  test_dependent_launch();
  test_arithmetic();
  cuda_check(cudaDeviceSynchronize());
  std::printf(failures ? "%d wrappers FAILED\n" : "all wrappers exact\n", failures);
  return failures != 0;
}
