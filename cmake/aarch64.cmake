# Toolchain: compiles for Linux on aarch64 with Debian's cross compiler (g++-aarch64-linux-gnu) and runs tests in emulation
# (qemu-user). LibTorch_ROOT must name a LibTorch for aarch64; `make aarch64` fetches one.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)

set(CMAKE_FIND_USE_CMAKE_SYSTEM_PATH OFF)  # the headers and libraries of this machine are not for that one
set(CMAKE_GTEST_DISCOVER_TESTS_DISCOVERY_MODE PRE_TEST)  # a build needs no emulation
