# The CPU backend. Its kernels are compiled once for each instruction set that ATen tells apart at run time, and those of
# attention once more for AVX-512 with bfloat16 products.
target_sources(selfattn PRIVATE csrc/cpu/gemm.cpp csrc/cpu/kv_cache_plan.cpp csrc/cpu/pair_table.cpp
                                csrc/cpu/select_kernels.cpp)

# Objects of the library, compiled as it is and with options of their own.
function(add_cpu_objects name)
  add_library(${name} OBJECT ${ARGN})
  target_compile_features(${name} PRIVATE cxx_std_20)
  target_compile_options(${name} PRIVATE $<TARGET_PROPERTY:selfattn,COMPILE_OPTIONS>)
  target_include_directories(${name} PRIVATE include csrc)
  target_link_libraries(${name} PRIVATE LibTorch::LibTorch)
  set_target_properties(${name} PROPERTIES CXX_EXTENSIONS OFF CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
                                           POSITION_INDEPENDENT_CODE ON)
  target_sources(selfattn PRIVATE $<TARGET_OBJECTS:${name}>)
endfunction()

# Threads come from at::parallel_for, which is inlined and needs OpenMP at compile time only: the runtime must be
# LibTorch's own, so nothing is linked here.
find_package(OpenMP COMPONENTS CXX)
add_cpu_objects(selfattn_cpu_threads csrc/cpu/flash_attention.cpp csrc/cpu/kv_cache.cpp csrc/cpu/kv_cache_append.cpp
                                     csrc/cpu/qk_norm_rope.cpp)
target_compile_options(selfattn_cpu_threads PRIVATE ${OpenMP_CXX_FLAGS})
set_target_properties(selfattn_cpu_threads PROPERTIES UNITY_BUILD ${SELFATTN_UNITY_BUILD} UNITY_BUILD_BATCH_SIZE 0)

# Attention rounds a product before a difference where its kernels say so: see differentiate_row.
set_source_files_properties(csrc/cpu/kernels/flash_kernels.cpp csrc/cpu/kernels/kv_cache_kernels.cpp
                            PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
set(kernel_warnings -Wno-unknown-pragmas -Wno-maybe-uninitialized -Wno-uninitialized -Wno-psabi)

# For one instruction set. `vectors`: the one of ATen's vectors.
function(add_cpu_kernels capability vectors)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "" "KERNELS;OPTIONS")
  list(TRANSFORM arg_KERNELS REPLACE "(.+)" "csrc/cpu/kernels/\\1_kernels.cpp")
  set(name selfattn_cpu_${capability})
  add_cpu_objects(${name} ${arg_KERNELS})
  target_compile_options(${name} PRIVATE -O3 ${kernel_warnings} ${arg_OPTIONS})
  target_compile_definitions(${name} PRIVATE CPU_CAPABILITY=${capability} CPU_CAPABILITY_${vectors})
endfunction()

add_cpu_kernels(DEFAULT DEFAULT KERNELS flash kv_cache qk_norm_rope)
set(cpu_capabilities default)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(avx2 -mavx2 -mfma -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
  add_cpu_kernels(AVX2 AVX2 KERNELS flash kv_cache qk_norm_rope OPTIONS ${avx2})
  add_cpu_kernels(AVX512 AVX512 KERNELS flash kv_cache qk_norm_rope OPTIONS ${avx512})
  add_cpu_kernels(AVX512_BF16 AVX512 KERNELS flash kv_cache OPTIONS ${avx512} -mavx512bf16)
  set_source_files_properties(csrc/cpu/select_kernels.cpp PROPERTIES COMPILE_DEFINITIONS SELFATTN_X86_KERNELS)
  string(APPEND cpu_capabilities " avx2 avx512 avx512_bf16")
endif()
list(APPEND SELFATTN_KERNELS "\"cpu\": \"${cpu_capabilities}\"")
