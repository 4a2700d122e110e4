# The CPU backend. Its kernels are compiled once for each instruction set that ATen tells apart at run time, and those of
# attention once more for AVX-512 with bfloat16 products.
target_sources(selfattn PRIVATE csrc/cpu/flash_attention.cpp csrc/cpu/gemm.cpp csrc/cpu/kv_cache.cpp
                                csrc/cpu/kv_cache_append.cpp csrc/cpu/kv_cache_plan.cpp csrc/cpu/pair_table.cpp
                                csrc/cpu/qk_norm_rope.cpp csrc/cpu/select_kernels.cpp)

# Threads come from at::parallel_for, which is inlined and needs OpenMP at compile time only: the runtime must be
# LibTorch's own, so nothing is linked here.
find_package(OpenMP COMPONENTS CXX)
if(OpenMP_CXX_FOUND)
  set_source_files_properties(csrc/cpu/flash_attention.cpp csrc/cpu/kv_cache.cpp csrc/cpu/kv_cache_append.cpp
                              csrc/cpu/qk_norm_rope.cpp
                              PROPERTIES COMPILE_OPTIONS "${OpenMP_CXX_FLAGS}")
endif()

set(kernel_warnings -Wno-unknown-pragmas -Wno-maybe-uninitialized -Wno-uninitialized -Wno-psabi)
function(add_cpu_kernels name capability vectors)
  set(source "${CMAKE_CURRENT_BINARY_DIR}/${name}_kernels.${capability}.cpp")
  file(CONFIGURE OUTPUT "${source}" CONTENT "#include \"cpu/kernels/${name}_kernels.cpp\"\n")
  set_source_files_properties(
    "${source}" PROPERTIES COMPILE_OPTIONS "-O3;${kernel_warnings};${ARGN}"
                           COMPILE_DEFINITIONS "CPU_CAPABILITY=${capability};CPU_CAPABILITY_${vectors}")
  target_sources(selfattn PRIVATE "${source}")
endfunction()

# Attention rounds a product before a difference where its kernels say so: see differentiate_row.
set(flash_options -ffp-contract=off)
set(kv_cache_options ${flash_options})
foreach(name flash kv_cache qk_norm_rope)
  add_cpu_kernels(${name} DEFAULT DEFAULT ${${name}_options})
endforeach()
set(cpu_capabilities default)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(avx2 -mavx2 -mfma -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
  foreach(name flash kv_cache qk_norm_rope)
    add_cpu_kernels(${name} AVX2 AVX2 ${avx2} ${${name}_options})
    add_cpu_kernels(${name} AVX512 AVX512 ${avx512} ${${name}_options})
  endforeach()
  foreach(name flash kv_cache)
    add_cpu_kernels(${name} AVX512_BF16 AVX512 ${avx512} -mavx512bf16 ${${name}_options})
  endforeach()
  set_source_files_properties(csrc/cpu/select_kernels.cpp PROPERTIES COMPILE_DEFINITIONS SELFATTN_X86_KERNELS)
  string(APPEND cpu_capabilities " avx2 avx512 avx512_bf16")
endif()
list(APPEND SELFATTN_KERNELS "\"cpu\": \"${cpu_capabilities}\"")
