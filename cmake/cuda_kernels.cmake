# The CUDA kernels, which know no torch header: objects for the architectures that can run them.
function(add_cuda_kernels name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "ARCHITECTURES;SOURCES")
  add_library(${name} OBJECT ${arg_SOURCES})
  target_compile_features(${name} PUBLIC cuda_std_20)
  target_include_directories(${name} PRIVATE csrc csrc/cuda)
  target_compile_options(${name} PRIVATE -Xptxas=-v)  # cmake/check_ptxas.py reads it
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.4)
    target_compile_options(${name} PRIVATE -compress-mode=size)  # a quarter of the bytes
  endif()
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${arg_ARCHITECTURES}" POSITION_INDEPENDENT_CODE ON
                                           CUDA_VISIBILITY_PRESET hidden)
  target_sources(selfattn PRIVATE $<TARGET_OBJECTS:${name}>)
  string(REGEX REPLACE "^selfattn_" "" family ${name})
  list(JOIN arg_ARCHITECTURES " " architectures)
  list(APPEND SELFATTN_KERNELS "\"${family}\": \"${architectures}\"")
  set(SELFATTN_KERNELS ${SELFATTN_KERNELS} PARENT_SCOPE)
endfunction()

include(cmake/cuda_architectures.cmake)

file(GLOB_RECURSE sm90_sources CONFIGURE_DEPENDS csrc/cuda/flash/sm90/*.cu)
add_cuda_kernels(selfattn_flash_sm90 ARCHITECTURES ${SELFATTN_SM90_ARCHITECTURES} SOURCES ${sm90_sources})

# Every card from 8.0 on but Hopper.
file(GLOB_RECURSE sm80_sources CONFIGURE_DEPENDS csrc/cuda/flash/sm80/*.cu)
set(unaligned_sources ${sm80_sources})
list(FILTER sm80_sources EXCLUDE REGEX "/unaligned_[^/]*$")
add_cuda_kernels(selfattn_flash_sm80 ARCHITECTURES ${SELFATTN_SM80_ARCHITECTURES} SOURCES ${sm80_sources})

# Head dimensions that are no multiple of 16 bytes take kernels of the sm80 family on Hopper, too; float32, the cache and
# the tables of segments have one set of kernels for all cards.
list(FILTER unaligned_sources INCLUDE REGEX "/unaligned_[^/]*$")
file(GLOB_RECURSE float32_sources CONFIGURE_DEPENDS csrc/cuda/flash/float32/*.cu)
file(GLOB_RECURSE kv_cache_sources CONFIGURE_DEPENDS csrc/cuda/flash/kv_cache/*.cu)
file(GLOB segments_sources CONFIGURE_DEPENDS csrc/cuda/flash/*.cu csrc/cuda/flash/segments/*.cu)
foreach(name IN ITEMS unaligned float32)
  add_cuda_kernels(selfattn_flash_${name} ARCHITECTURES ${SELFATTN_RARE_ARCHITECTURES} SOURCES ${${name}_sources})
endforeach()
foreach(name IN ITEMS kv_cache segments)
  add_cuda_kernels(selfattn_flash_${name} ARCHITECTURES ${SELFATTN_FLASH_ARCHITECTURES} SOURCES ${${name}_sources})
endforeach()

file(GLOB_RECURSE qk_norm_rope_sources CONFIGURE_DEPENDS csrc/cuda/qk_norm_rope/*.cu)
file(GLOB kv_cache_positions_sources CONFIGURE_DEPENDS csrc/cuda/kv_cache/*.cu)
foreach(name IN ITEMS qk_norm_rope kv_cache_positions)
  add_cuda_kernels(selfattn_${name} ARCHITECTURES ${SELFATTN_CUDA_ARCHITECTURES} SOURCES ${${name}_sources})
endforeach()
