// Warpgroup matrix products m64nNk16 with float32 accumulators (PTX wgmma), for every N that the kernels use.
//
// Operands lie in shared memory as panels [rows][64 elements] = 128 bytes a row, 128-byte swizzle, panel 1024-byte
// aligned: the 16-byte chunk c of row r is stored at chunk c ^ (r % 8). See matrix_descriptor for the two orientations.
// Accumulator i of a lane: row 16 * warp + lane / 4 + 8 * (i / 2 % 2), column i / 4 * 8 + 2 * (lane % 4) + i % 2.
// The A fragment of k-step i is the accumulator layout packed in pairs: registers {0,1} {2,3} {4,5} {6,7} of 8i .. 8i
// + 7.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace selfattn::ptx {

// Before the first product after registers or shared memory were written by this warpgroup.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// At most kPending committed groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Pins registers at this point: the compiler moves no access to them across it. No instruction.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+r"(registers[i])::"memory");
}

// What is added to an operand's descriptor to stand so many bytes further on.
__host__ __device__ constexpr int operand_step(int bytes) { return bytes / 16; }

// The same for the i-th 16 columns of rows that lie in panels of 64 columns, panel_bytes apart.
__host__ __device__ constexpr int operand_columns(int i, int panel_bytes) {
  return operand_step(i / 4 * panel_bytes + i % 4 * 32);
}

// Descriptor of an operand in 128-byte-swizzled panels. It advances by plain addition (operand_step).
//   K-major (rows are m or n, columns the summed dimension): panel_bytes unused. k16 step: + 32 bytes within a panel,
//     then the next panel.
//   MN-major (rows are the summed dimension): panel_bytes leads to the next 64 of m or n. k16 step: + 2048 bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t s_address, uint32_t panel_bytes = 16) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return static_cast<uint64_t>((s_address & 0x3FFFF) >> 4) | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
         kEightRows << 32 | kSwizzle128 << 62;
}

// Wgmma<Element, N>: d (64 x N) += A B with
//   ss   A and B from shared memory            rs   A from registers, B from shared memory
//   *_overwrite: d = A B, with d an output only, so that no earlier use of its registers matters.
// kTransposeA, kTransposeB: the operand is MN-major.
template <class Element, int N>
struct Wgmma;

#define SELFATTN_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SELFATTN_REGISTERS_16 SELFATTN_REGISTERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SELFATTN_REGISTERS_24 SELFATTN_REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SELFATTN_REGISTERS_32 SELFATTN_REGISTERS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define SELFATTN_REGISTERS_40 SELFATTN_REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SELFATTN_REGISTERS_48 SELFATTN_REGISTERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SELFATTN_REGISTERS_56 SELFATTN_REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SELFATTN_REGISTERS_64 SELFATTN_REGISTERS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define SELFATTN_REGISTERS_72 SELFATTN_REGISTERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define SELFATTN_REGISTERS_80 SELFATTN_REGISTERS_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define SELFATTN_REGISTERS_88 SELFATTN_REGISTERS_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define SELFATTN_REGISTERS_96 SELFATTN_REGISTERS_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define SELFATTN_REGISTERS_104 SELFATTN_REGISTERS_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define SELFATTN_REGISTERS_112 SELFATTN_REGISTERS_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define SELFATTN_REGISTERS_120 SELFATTN_REGISTERS_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define SELFATTN_REGISTERS_128 SELFATTN_REGISTERS_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define SELFATTN_OPERANDS_8(mode) \
  mode(d[0]), mode(d[1]), mode(d[2]), mode(d[3]), mode(d[4]), mode(d[5]), mode(d[6]), mode(d[7])
#define SELFATTN_OPERANDS_16(mode)                                                                                    \
  SELFATTN_OPERANDS_8(mode), mode(d[8]), mode(d[9]), mode(d[10]), mode(d[11]), mode(d[12]), mode(d[13]), mode(d[14]), \
      mode(d[15])
#define SELFATTN_OPERANDS_24(mode)                                                                          \
  SELFATTN_OPERANDS_16(mode), mode(d[16]), mode(d[17]), mode(d[18]), mode(d[19]), mode(d[20]), mode(d[21]), \
      mode(d[22]), mode(d[23])
#define SELFATTN_OPERANDS_32(mode)                                                                          \
  SELFATTN_OPERANDS_24(mode), mode(d[24]), mode(d[25]), mode(d[26]), mode(d[27]), mode(d[28]), mode(d[29]), \
      mode(d[30]), mode(d[31])
#define SELFATTN_OPERANDS_40(mode)                                                                          \
  SELFATTN_OPERANDS_32(mode), mode(d[32]), mode(d[33]), mode(d[34]), mode(d[35]), mode(d[36]), mode(d[37]), \
      mode(d[38]), mode(d[39])
#define SELFATTN_OPERANDS_48(mode)                                                                          \
  SELFATTN_OPERANDS_40(mode), mode(d[40]), mode(d[41]), mode(d[42]), mode(d[43]), mode(d[44]), mode(d[45]), \
      mode(d[46]), mode(d[47])
#define SELFATTN_OPERANDS_56(mode)                                                                          \
  SELFATTN_OPERANDS_48(mode), mode(d[48]), mode(d[49]), mode(d[50]), mode(d[51]), mode(d[52]), mode(d[53]), \
      mode(d[54]), mode(d[55])
#define SELFATTN_OPERANDS_64(mode)                                                                          \
  SELFATTN_OPERANDS_56(mode), mode(d[56]), mode(d[57]), mode(d[58]), mode(d[59]), mode(d[60]), mode(d[61]), \
      mode(d[62]), mode(d[63])
#define SELFATTN_OPERANDS_72(mode)                                                                          \
  SELFATTN_OPERANDS_64(mode), mode(d[64]), mode(d[65]), mode(d[66]), mode(d[67]), mode(d[68]), mode(d[69]), \
      mode(d[70]), mode(d[71])
#define SELFATTN_OPERANDS_80(mode)                                                                          \
  SELFATTN_OPERANDS_72(mode), mode(d[72]), mode(d[73]), mode(d[74]), mode(d[75]), mode(d[76]), mode(d[77]), \
      mode(d[78]), mode(d[79])
#define SELFATTN_OPERANDS_88(mode)                                                                          \
  SELFATTN_OPERANDS_80(mode), mode(d[80]), mode(d[81]), mode(d[82]), mode(d[83]), mode(d[84]), mode(d[85]), \
      mode(d[86]), mode(d[87])
#define SELFATTN_OPERANDS_96(mode)                                                                          \
  SELFATTN_OPERANDS_88(mode), mode(d[88]), mode(d[89]), mode(d[90]), mode(d[91]), mode(d[92]), mode(d[93]), \
      mode(d[94]), mode(d[95])
#define SELFATTN_OPERANDS_104(mode)                                                                           \
  SELFATTN_OPERANDS_96(mode), mode(d[96]), mode(d[97]), mode(d[98]), mode(d[99]), mode(d[100]), mode(d[101]), \
      mode(d[102]), mode(d[103])
#define SELFATTN_OPERANDS_112(mode)                                                                                \
  SELFATTN_OPERANDS_104(mode), mode(d[104]), mode(d[105]), mode(d[106]), mode(d[107]), mode(d[108]), mode(d[109]), \
      mode(d[110]), mode(d[111])
#define SELFATTN_OPERANDS_120(mode)                                                                                \
  SELFATTN_OPERANDS_112(mode), mode(d[112]), mode(d[113]), mode(d[114]), mode(d[115]), mode(d[116]), mode(d[117]), \
      mode(d[118]), mode(d[119])
#define SELFATTN_OPERANDS_128(mode)                                                                                \
  SELFATTN_OPERANDS_120(mode), mode(d[120]), mode(d[121]), mode(d[122]), mode(d[123]), mode(d[124]), mode(d[125]), \
      mode(d[126]), mode(d[127])
#define SELFATTN_IN_OUT(register) "+f"(register)
#define SELFATTN_OUT(register) "=f"(register)

// R: number of accumulators a lane; R0 .. R6: the operand numbers that follow them. SCALE_D 0 overwrites, 1 adds.
#define SELFATTN_WGMMA_SS(NAME, N, TYPE, R, MODE, SCALE_D, R0, R1, R2, R3)                                         \
  template <bool kTransposeA = false, bool kTransposeB = false>                                                    \
  static __device__ __forceinline__ void NAME(float (&d)[R], uint64_t a, uint64_t b) {                             \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " SCALE_D ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N    \
                 "k16.f32." #TYPE "." #TYPE " {" SELFATTN_REGISTERS_##R "}, %" #R0 ", %" #R1 ", adds, 1, 1, %" #R2 \
                                                                        ", %" #R3 ";\n}\n"                         \
                 : SELFATTN_OPERANDS_##R(MODE)                                                                     \
                 : "l"(a), "l"(b), "n"(int(kTransposeA)), "n"(int(kTransposeB)));                                  \
  }
#define SELFATTN_WGMMA_RS(NAME, N, TYPE, R, MODE, SCALE_D, R0, R1, R2, R3, R4, R5)                                \
  template <bool kTransposeB = false>                                                                             \
  static __device__ __forceinline__ void NAME(float (&d)[R], const uint32_t* a, uint64_t b) {                     \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " SCALE_D ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N   \
                 "k16.f32." #TYPE "." #TYPE " {" SELFATTN_REGISTERS_##R "}, {%" #R0 ", %" #R1 ", %" #R2 ", %" #R3 \
                                                                        "}, %" #R4 ", adds, 1, 1, %" #R5 ";\n}\n" \
                 : SELFATTN_OPERANDS_##R(MODE)                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kTransposeB)));                    \
  }
#define SELFATTN_WGMMA(ELEMENT, TYPE, N, R, R0, R1, R2, R3, R4, R5)                        \
  template <>                                                                              \
  struct Wgmma<ELEMENT, N> {                                                               \
    SELFATTN_WGMMA_SS(ss, N, TYPE, R, SELFATTN_IN_OUT, "1", R0, R1, R2, R3)                \
    SELFATTN_WGMMA_SS(ss_overwrite, N, TYPE, R, SELFATTN_OUT, "0", R0, R1, R2, R3)         \
    SELFATTN_WGMMA_RS(rs, N, TYPE, R, SELFATTN_IN_OUT, "1", R0, R1, R2, R3, R4, R5)        \
    SELFATTN_WGMMA_RS(rs_overwrite, N, TYPE, R, SELFATTN_OUT, "0", R0, R1, R2, R3, R4, R5) \
  };
#define SELFATTN_WGMMA_TYPES(N, R, ...)                  \
  SELFATTN_WGMMA(__nv_bfloat16, bf16, N, R, __VA_ARGS__) \
  SELFATTN_WGMMA(__half, f16, N, R, __VA_ARGS__)

SELFATTN_WGMMA_TYPES(32, 16, 16, 17, 18, 19, 20, 21)
SELFATTN_WGMMA_TYPES(64, 32, 32, 33, 34, 35, 36, 37)
SELFATTN_WGMMA_TYPES(80, 40, 40, 41, 42, 43, 44, 45)
SELFATTN_WGMMA_TYPES(96, 48, 48, 49, 50, 51, 52, 53)
SELFATTN_WGMMA_TYPES(112, 56, 56, 57, 58, 59, 60, 61)
SELFATTN_WGMMA_TYPES(128, 64, 64, 65, 66, 67, 68, 69)
SELFATTN_WGMMA_TYPES(192, 96, 96, 97, 98, 99, 100, 101)
SELFATTN_WGMMA_TYPES(256, 128, 128, 129, 130, 131, 132, 133)

#undef SELFATTN_WGMMA_TYPES
#undef SELFATTN_WGMMA
#undef SELFATTN_WGMMA_RS
#undef SELFATTN_WGMMA_SS
#undef SELFATTN_OUT
#undef SELFATTN_IN_OUT
#undef SELFATTN_OPERANDS_8
#undef SELFATTN_REGISTERS_8
#undef SELFATTN_OPERANDS_16
#undef SELFATTN_REGISTERS_16
#undef SELFATTN_OPERANDS_24
#undef SELFATTN_REGISTERS_24
#undef SELFATTN_OPERANDS_32
#undef SELFATTN_REGISTERS_32
#undef SELFATTN_OPERANDS_40
#undef SELFATTN_REGISTERS_40
#undef SELFATTN_OPERANDS_48
#undef SELFATTN_REGISTERS_48
#undef SELFATTN_OPERANDS_56
#undef SELFATTN_REGISTERS_56
#undef SELFATTN_OPERANDS_64
#undef SELFATTN_REGISTERS_64
#undef SELFATTN_OPERANDS_72
#undef SELFATTN_REGISTERS_72
#undef SELFATTN_OPERANDS_80
#undef SELFATTN_REGISTERS_80
#undef SELFATTN_OPERANDS_88
#undef SELFATTN_REGISTERS_88
#undef SELFATTN_OPERANDS_96
#undef SELFATTN_REGISTERS_96
#undef SELFATTN_OPERANDS_104
#undef SELFATTN_REGISTERS_104
#undef SELFATTN_OPERANDS_112
#undef SELFATTN_REGISTERS_112
#undef SELFATTN_OPERANDS_120
#undef SELFATTN_REGISTERS_120
#undef SELFATTN_OPERANDS_128
#undef SELFATTN_REGISTERS_128

}  // namespace selfattn::ptx
