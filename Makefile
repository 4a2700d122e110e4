# make demo | test | test-integrations | test-matrix | lint | docs | bench-cpu | sanitize | coverage | install | wheel |
# aarch64 | wheel-aarch64 | wheel-aarch64-cuda | clean (see CONTRIBUTING.md)
# Everything lies in this folder: .venv (Python packages), build (CMake), build/install (the C++ package).
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
# Compilations and test processes at a time. A CUDA unit takes up to 2 GB.
JOBS ?= $(shell nproc)
comma := ,
CMAKE_ARGS ?=
CONFIGURE = $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
  -DPython3_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_INSTALL_LIBDIR=lib -S .
export SELFATTN_LIBRARY := $(abspath build/libselfattn.so)
export PYTHONPATH := $(CURDIR)
# Bytes of registers that functions may spill, whose names have these parts (cmake/check_ptxas.py). A part may be an
# architecture: sm80+forward_kernel+sm_120=280.
SPILLS = sm90+backward=496 sm90+backward_dkdv=832 sm90+forward=272 \
  sm80+forward_kernel=320 sm80+forward_kernel+sm_80=368 sm80+backward_kernel=192 sm80+backward_dq_kernel=104 \
  sm80+backward_dkdv_kernel=144 sm80+repair=352 \
  float32+forward_kernel=256 float32+backward_dq_kernel=400 float32+backward_dkdv_kernel=432 float32+repair=288 \
  flash_attention_kv_cache=88
SOURCES = $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

.PHONY: all build install demo test test-cpp test-python test-integrations test-matrix coverage sanitize lint format docs \
  bench-cpu wheel sdist build-aarch64 aarch64 wheel-aarch64 wheel-aarch64-cuda clean

all: build

# ---------------------------------------------------------------- set-up
$(VENV)/.debian: .ci/debian_packages
	@sh .ci/debian_packages
	@mkdir -p $(VENV) && touch $@

$(VENV)/.python: $(VENV)/.debian
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# The lists of packages stand in pyproject.toml alone.
$(VENV)/.packages: $(VENV)/.python pyproject.toml
	$(BIN)/python .ci/requirements.py build demo test lint dev > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/requirements.txt
	touch $@

$(VENV)/.integrations: $(VENV)/.packages pyproject.toml
	$(BIN)/python .ci/requirements.py integrations > $(VENV)/requirements-integrations.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/requirements-integrations.txt
	touch $@

$(VENV)/.wheel: $(VENV)/.packages pyproject.toml
	$(BIN)/python .ci/requirements.py wheel > $(VENV)/requirements-wheel.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/requirements-wheel.txt
	touch $@

$(VENV)/.docs: $(VENV)/.packages pyproject.toml
	$(BIN)/python .ci/requirements.py docs > $(VENV)/requirements-docs.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/requirements-docs.txt
	touch $@

# ---------------------------------------------------------------- build
build/build.ninja: CMakeLists.txt $(VENV)/.packages
	$(CONFIGURE) -B build -DSELFATTN_TESTS=ON $(CMAKE_ARGS)

build: build/build.ninja
	$(BIN)/cmake --build build -j $(JOBS) 2>&1 | tee build/build.log | \
	  { grep -v -E '^ptxas info|bytes stack frame|^ *Function properties' || true; }
	@! grep -q 'Building CUDA object.*instantiations' build/build.log || { \
	  build/tests/cpp/cuda/selfattn_shared_memory > build/shared_memory.txt && \
	  $(BIN)/python cmake/check_ptxas.py build/build.log --shared-memory build/shared_memory.txt $(SPILLS:%=--allow %); }

install: build
	$(BIN)/cmake --install build --prefix build/install > /dev/null

# ---------------------------------------------------------------- packages
# A wheel in dist/ for every Python 3 and one minor version of torch, which its version names: a folder may hold those
# of several. CMAKE_ARGS=-DSELFATTN_CUDA=OFF makes one without CUDA kernels.
TORCH ?= 2.11
WHEEL = build-wheel/torch$(TORCH)
# What torch brings; auditwheel takes every other library that manylinux does not promise into the wheel.
EXCLUDED = $(addprefix --exclude ,libtorch.so libtorch_cpu.so libtorch_cuda.so libc10.so libc10_cuda.so 'libcudart.so.*')

# $(call make_wheel,FOLDER,FOLDER OF THE TOOLS,CMAKE OPTIONS,LOCAL VERSION,ENVIRONMENT) makes FOLDER/manylinux/*.whl and checks
# it. build/lib.* may hold files of an earlier build, and selfattn.egg-info what another torch's needs, of which pip would warn.
define make_wheel
	rm -rf $(1)/linux $(1)/manylinux build/lib.* selfattn.egg-info
	export PATH=$(abspath $(2)):$$PATH $(5) && \
	  MAX_JOBS=$(JOBS) SELFATTN_CMAKE_ARGS="$(3) $(CMAKE_ARGS)" SELFATTN_LOCAL_VERSION=$(strip $(4)) \
	  pip wheel --no-build-isolation --no-deps --wheel-dir $(1)/linux . && \
	  auditwheel repair $(EXCLUDED) --wheel-dir $(1)/manylinux $(1)/linux/*.whl
	$(2)/python .ci/check_wheel.py $(1)/manylinux/*.whl
endef

wheel: $(VENV)/.debian
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python .ci/requirements.py build wheel > $(WHEEL)/requirements.txt
	$(WHEEL)/bin/python -m pip install --quiet --requirement $(WHEEL)/requirements.txt 'torch==$(TORCH).*'
	$(call make_wheel,$(WHEEL),$(WHEEL)/bin,-DSELFATTN_CUDA=ON -DSELFATTN_COMPUTE_CAPABILITIES=all,\
	  torch$(TORCH)$(if $(findstring SELFATTN_CUDA=OFF,$(CMAKE_ARGS)),.cpu))
	$(WHEEL)/bin/python -m pip install --quiet --force-reinstall --no-deps $(WHEEL)/manylinux/*.whl
	cd $(WHEEL) && env -u PYTHONPATH -u SELFATTN_LIBRARY bin/python -m selfattn
	mkdir -p dist && cp $(WHEEL)/manylinux/*.whl dist

sdist: $(VENV)/.packages
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

# ---------------------------------------------------------------- for aarch64, from here
# The CPU library, compiled by a cross compiler; its C++ tests run in emulation, as if on these processors: one without SVE, and
# one of every extension that the emulation knows. PyPI's torch needs ARMv8.1.
AARCH64 = build-aarch64/torch$(TORCH)
PROCESSORS ?= neoverse-n1 max
TOOLCHAIN = -DCMAKE_TOOLCHAIN_FILE=$(abspath cmake/aarch64.cmake)

$(AARCH64)/.torch: .ci/torch_for_aarch64 | $(VENV)/.packages
	sh .ci/debian_packages aarch64
	sh .ci/torch_for_aarch64 $(TORCH) $(BIN)/python $(abspath $(AARCH64)/site-packages)
	touch $@

build-aarch64/googletest/install/lib/libgtest.a: | $(AARCH64)/.torch
	$(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) $(TOOLCHAIN) -DBUILD_GMOCK=OFF \
	  -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_LIBDIR=lib -Wno-dev -S /usr/src/googletest -B build-aarch64/googletest
	$(BIN)/cmake --build build-aarch64/googletest -j $(JOBS)
	$(BIN)/cmake --install build-aarch64/googletest --prefix build-aarch64/googletest/install

build-aarch64: $(AARCH64)/.torch build-aarch64/googletest/install/lib/libgtest.a
	$(CONFIGURE) -B $(AARCH64)/build $(TOOLCHAIN) -DLibTorch_ROOT=$(abspath $(AARCH64)/site-packages/torch) \
	  -DCMAKE_PREFIX_PATH=$(abspath build-aarch64/googletest/install) -DSELFATTN_TESTS=ON -DSELFATTN_CUDA=OFF $(CMAKE_ARGS)
	$(BIN)/cmake --build $(AARCH64)/build -j $(JOBS)

aarch64: build-aarch64
	$(BIN)/python .ci/test_aarch64.py $(AARCH64)/build --torch $(AARCH64)/site-packages --processors $(PROCESSORS)

# A wheel of it: $(call wheel_for_aarch64,CMAKE OPTIONS,LOCAL VERSION). What builds finds torch for aarch64 in the place of this
# machine's; the toolchain is read by a new build alone.
define wheel_for_aarch64
	rm -rf build/temp.linux-aarch64* $(AARCH64)/site-packages/selfattn*
	$(call make_wheel,$(AARCH64),$(BIN),$(TOOLCHAIN) $(1),$(2),PYTHONPATH=$(abspath $(AARCH64)/site-packages) \
	  _PYTHON_HOST_PLATFORM=linux-aarch64)
endef

# The tests load the library of the wheel.
wheel-aarch64: build-aarch64 $(VENV)/.wheel
	$(call wheel_for_aarch64,-DSELFATTN_CUDA=OFF,torch$(TORCH).cpu)
	$(BIN)/python -m zipfile -e $(AARCH64)/manylinux/*.whl $(AARCH64)/site-packages
	$(BIN)/python .ci/test_aarch64.py $(AARCH64)/build --torch $(AARCH64)/site-packages --processors $(PROCESSORS) \
	  --library $(AARCH64)/site-packages/selfattn/lib
	mkdir -p dist && cp $(AARCH64)/manylinux/*.whl dist

# With CUDA kernels, by nvcc of this machine. Nothing of it can run here: that each symbol is there is for the linker to say, but
# for OpenMP's, which are those of the runtime that torch has loaded.
OPENMP_SYMBOLS = GOMP_parallel omp_get_num_threads omp_get_thread_num
wheel-aarch64-cuda: $(AARCH64)/.torch $(VENV)/.wheel
	$(call wheel_for_aarch64,-DSELFATTN_CUDA=ON -DSELFATTN_COMPUTE_CAPABILITIES=all \
	  '-DCMAKE_SHARED_LINKER_FLAGS=-Wl$(comma)-z$(comma)defs \
	  $(addprefix -Wl$(comma)--ignore-unresolved-symbol$(comma),$(OPENMP_SYMBOLS))',torch$(TORCH))
	mkdir -p dist && cp $(AARCH64)/manylinux/*.whl dist

# ---------------------------------------------------------------- use
# On several processes of this machine, one a GPU where there are any: `make demo RANKS=2`.
RANKS ?= 1
TORCHRUN = -m torch.distributed.run --standalone --nproc-per-node $(RANKS)
demo: install
	$(BIN)/python $(if $(filter-out 1,$(RANKS)),$(TORCHRUN)) examples/train_packed/demo.py $(DEMO_ARGS)

bench-cpu: build
	$(BIN)/python benchmarks/attention_cpu.py $(BENCH_ARGS)

# The site, in build/docs. What is read anew (-E) is warned of again, and a warning is an error.
docs: build $(VENV)/.docs
	$(BIN)/python -m sphinx -q -E -W --keep-going -c docs/site -d build/docs_work/doctrees docs build/docs

# ---------------------------------------------------------------- check
test: test-cpp test-python

test-cpp: build
	$(BIN)/ctest --test-dir build --output-on-failure

test-python: install
	$(PYTEST) $(PYTEST_ARGS)

# With the libraries that selfattn plugs into, which nothing else needs.
test-integrations: build $(VENV)/.integrations
	$(PYTEST) tests/integrations $(PYTEST_ARGS)

# The quick tests with the oldest and the newest torch that pyproject.toml takes, on the CPU, in fresh environments:
# gigabytes to download, and a build each. CI, whose time is short, runs some of them with the newest.
TORCHES ?= 2.11 2.15
PYTHONS ?= $(PYTHON)
MATRIX_ARGS ?=
test-matrix: $(VENV)/.debian
	$(PYTHON) .ci/test_matrix.py --torch $(TORCHES) --python $(PYTHONS) --jobs $(JOBS) $(MATRIX_ARGS)

# Python's lines, and C++'s of the CPU part, that the C++ tests and the quick Python tests reach; those of several processes
# test Python alone. Inner loops run more often than the 2^32 times from which on gcovr suspects an error.
coverage: $(VENV)/.packages
	$(CONFIGURE) -B build-coverage -DSELFATTN_TESTS=ON -DSELFATTN_CUDA=OFF -DSELFATTN_COVERAGE=ON
	$(BIN)/cmake --build build-coverage -j $(JOBS)
	find build-coverage -name '*.gcda' -delete
	$(BIN)/ctest --test-dir build-coverage --output-on-failure
	SELFATTN_LIBRARY=$(abspath build-coverage/libselfattn.so) $(PYTEST) -q --cov --cov-report=term -m "not slow" \
	  --ignore=tests/python/distributed $(PYTEST_ARGS)
	$(BIN)/gcovr --gcov-suspicious-hits-threshold 0 --root . --filter csrc/ --filter include/ --exclude-throw-branches build-coverage

# Python does not link the sanitizers, so the fuzz preloads them, and what they look for when they start: C++'s exceptions.
SANITIZER_OPTIONS := ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
SANITIZER_LIBRARIES = $(foreach name,libasan libubsan libstdc++,$(shell $(CXX) -print-file-name=$(name).so))

sanitize: $(VENV)/.packages
	$(CONFIGURE) -B build-sanitize -DSELFATTN_TESTS=ON -DSELFATTN_CUDA=OFF -DSELFATTN_SANITIZE=address,undefined
	$(BIN)/cmake --build build-sanitize -j $(JOBS)
	$(SANITIZER_OPTIONS) $(BIN)/ctest --test-dir build-sanitize --output-on-failure
	$(SANITIZER_OPTIONS) LD_PRELOAD="$(SANITIZER_LIBRARIES)" OMP_NUM_THREADS=2 SELFATTN_FUZZ_CALLS=60 \
	  SELFATTN_LIBRARY=$(abspath build-sanitize/libselfattn.so) \
	  $(BIN)/python -m pytest -q -p no:cacheprovider tests/python/errors/test_fuzz_operators.py

lint: $(VENV)/.packages
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.packages
	$(BIN)/clang-format -i $(SOURCES)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build build-coverage build-sanitize build-wheel build-matrix build-aarch64
