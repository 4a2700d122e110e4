# Toolchain: compiles for Linux on aarch64 with Debian's cross compiler (g++-aarch64-linux-gnu) and runs tests in emulation
# (qemu-user). LibTorch_ROOT must name a LibTorch for aarch64; `make aarch64` fetches one.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)

set(CMAKE_FIND_USE_CMAKE_SYSTEM_PATH OFF)  # the headers and libraries of this machine are not for that one
set(CMAKE_GTEST_DISCOVER_TESTS_DISCOVERY_MODE PRE_TEST)  # a build needs no emulation

# CUDA, unless SELFATTN_CUDA=OFF, is compiled by nvcc of this machine with its own headers, which are those of every machine. The
# runtime is that beside torch for aarch64.
find_program(nvcc nvcc HINTS /usr/local/cuda/bin NO_CACHE)
file(GLOB runtime "${LibTorch_ROOT}/../nvidia/cu*/lib/libcudart.so.*")
if(SELFATTN_CUDA AND nvcc AND runtime)
  set(CMAKE_CUDA_COMPILER "${nvcc}")
  set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)
  file(REAL_PATH "${nvcc}" nvcc)
  cmake_path(GET nvcc PARENT_PATH toolkit)
  cmake_path(GET toolkit PARENT_PATH toolkit)
  cmake_path(GET runtime PARENT_PATH runtime_folder)
  set(CMAKE_CUDA_FLAGS_INIT "-I${toolkit}/include -I${toolkit}/include/cccl -L${runtime_folder}")
  set(CMAKE_CXX_STANDARD_INCLUDE_DIRECTORIES "${toolkit}/include")
  set(CUDA_cudart_LIBRARY "${runtime}" CACHE FILEPATH "")
endif()
