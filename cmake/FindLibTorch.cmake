# FindLibTorch
# ------------
# Finds LibTorch by its headers and shared libraries and defines the target LibTorch::LibTorch.
#
# TorchConfig.cmake of a CUDA build of PyTorch stops where no CUDA toolkit is installed. A library or application that
# only calls ATen needs none, so this module takes the headers and libraries as they lie in the package.
#
# Searched: LibTorch_ROOT, TORCH_INSTALL_PREFIX, CMAKE_PREFIX_PATH (also torch.utils.cmake_prefix_path), and at last the
# package that `python3 -c "import torch"` finds, which is for this machine: not where another one is compiled for.
# Sets: LibTorch_FOUND, LibTorch_VERSION, LibTorch_ROOT_DIR, LibTorch_CUDA (the package holds libtorch_cuda),
# LibTorch_CUDA_VERSION (that it was built with, of a Python package).

set(_libtorch_hints ${LibTorch_ROOT} ${TORCH_INSTALL_PREFIX} $ENV{TORCH_INSTALL_PREFIX})
foreach(_prefix IN LISTS CMAKE_PREFIX_PATH)
  list(APPEND _libtorch_hints "${_prefix}" "${_prefix}/../..")
endforeach()
find_path(LibTorch_INCLUDE_DIR torch/library.h HINTS ${_libtorch_hints} PATH_SUFFIXES include NO_DEFAULT_PATH)

if(NOT LibTorch_INCLUDE_DIR AND NOT CMAKE_CROSSCOMPILING)
  find_package(Python3 QUIET COMPONENTS Interpreter)
  if(Python3_FOUND)
    execute_process(
      COMMAND "${Python3_EXECUTABLE}" -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
      OUTPUT_VARIABLE _libtorch_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    find_path(LibTorch_INCLUDE_DIR torch/library.h HINTS "${_libtorch_package}/include" NO_DEFAULT_PATH)
  endif()
endif()
if(NOT LibTorch_INCLUDE_DIR)
  find_path(LibTorch_INCLUDE_DIR torch/library.h)
endif()

if(LibTorch_INCLUDE_DIR)
  get_filename_component(LibTorch_ROOT_DIR "${LibTorch_INCLUDE_DIR}" DIRECTORY)
  foreach(_name torch torch_cpu c10 torch_cuda c10_cuda)
    find_library(LibTorch_${_name}_LIBRARY ${_name} HINTS "${LibTorch_ROOT_DIR}/lib" NO_DEFAULT_PATH)
    mark_as_advanced(LibTorch_${_name}_LIBRARY)
  endforeach()
  foreach(_header torch/headeronly/version.h torch/version.h torch/csrc/api/include/torch/version.h)
    if(NOT LibTorch_VERSION AND EXISTS "${LibTorch_INCLUDE_DIR}/${_header}")
      file(STRINGS "${LibTorch_INCLUDE_DIR}/${_header}" _libtorch_lines REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
      string(REGEX REPLACE "[^0-9;]" "" _libtorch_lines "${_libtorch_lines}")
      string(REPLACE ";" "." LibTorch_VERSION "${_libtorch_lines}")
    endif()
  endforeach()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  LibTorch
  REQUIRED_VARS LibTorch_INCLUDE_DIR LibTorch_torch_LIBRARY LibTorch_torch_cpu_LIBRARY LibTorch_c10_LIBRARY
  VERSION_VAR LibTorch_VERSION)
mark_as_advanced(LibTorch_INCLUDE_DIR)

if(LibTorch_FOUND)
  set(LibTorch_CUDA OFF)
  if(LibTorch_torch_cuda_LIBRARY AND LibTorch_c10_cuda_LIBRARY)
    set(LibTorch_CUDA ON)
  endif()
  set(LibTorch_CUDA_VERSION "")
  if(EXISTS "${LibTorch_ROOT_DIR}/version.py")
    file(STRINGS "${LibTorch_ROOT_DIR}/version.py" _libtorch_lines REGEX "^cuda.*= *'[0-9.]+'")
    string(REGEX MATCH "[0-9]+[0-9.]*" LibTorch_CUDA_VERSION "${_libtorch_lines}")
  endif()
  if(NOT TARGET LibTorch::LibTorch)
    add_library(LibTorch::LibTorch INTERFACE IMPORTED GLOBAL)  # for projects around this one, too
    target_include_directories(LibTorch::LibTorch SYSTEM INTERFACE
      "${LibTorch_INCLUDE_DIR}" "${LibTorch_INCLUDE_DIR}/torch/csrc/api/include")
    target_link_libraries(LibTorch::LibTorch INTERFACE
      "${LibTorch_torch_LIBRARY}" "${LibTorch_torch_cpu_LIBRARY}" "${LibTorch_c10_LIBRARY}")
    # libtorch.so holds no symbol of its own, it only pulls libtorch_cuda in; and a program that only loads saved modules
    # names no symbol of the library that registers their operators. A linker must keep both all the same.
    target_link_options(LibTorch::LibTorch INTERFACE "LINKER:--no-as-needed")
    target_compile_features(LibTorch::LibTorch INTERFACE cxx_std_20)
  endif()
endif()
