# make demo | test | test-torch | torch-suite | docs | lint | format | stubs | check-stubs | sanitize | build | cuda | clean | test-gpu | bench-gpu
# These need Python >= 3.10, a C++20 compiler and make; the rest is installed into .venv.

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PYTHON_SOURCES := $(wildcard pycomm tests examples scripts bench docs README.md)
CXX_SOURCES = $(shell find $(wildcard csrc tests bench) -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
export PATH := $(BIN):$(PATH)
# With this, ccache also finds what another clone compiled.
export CCACHE_BASEDIR := $(CURDIR)
# Ninja would compile two more files at a time, which would only compete for the caches.
export CMAKE_BUILD_PARALLEL_LEVEL := $(shell nproc)
# The tests start a thousand interpreters, which would each compile NumPy.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-torch torch-suite docs build cuda lint format stubs check-stubs sanitize clean test-gpu bench-gpu \
  build-gpu-modules compile compile-with-tests
.DELETE_ON_ERROR:

demo:
	@$(MAKE) --no-print-directory -j2 compile $(VENV)/.demo
	@$(BIN)/python examples/train_lm.py

# One thread for OpenBLAS, whose threads spin as they start; and one test more than there are cores, since many wait.
test: build
	@echo "== C++ tests"
	@ctest --test-dir build --output-on-failure --no-tests=error -j $$(nproc)
	@echo "== Python tests"
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(($$(nproc) + 1)) --dist worksteal

# With torch, of any version (TORCH=2.14.1), in an environment of its own that has the rest from .venv.
TORCH := 2.13.0
TORCH_VENV := $(VENV)-torch-$(TORCH)
SITE := python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
test-torch: build $(TORCH_VENV)/.done
	@echo "== PyTorch tests"
	@OPENBLAS_NUM_THREADS=1 $(TORCH_VENV)/bin/python -m pytest -n $$(($$(nproc) + 1)) --dist worksteal tests/pytorch \
	  tests/python/test_torch.py tests/python/test_reducer_torch.py tests/python/test_docs.py

build:
	@$(MAKE) --no-print-directory -j2 compile-with-tests $(VENV)/.dev

# Compiling needs few packages; the others are fetched at the same time.
compile: $(VENV)/.build
	$(call install,OFF,OFF)
compile-with-tests: $(VENV)/.build
	$(call install,ON,OFF)

# With the CUDA kernels, for every kind of GPU or only for ARCHITECTURES=80,90. This needs nvcc but no GPU;
# warnings are errors.
ARCHITECTURES :=
cuda: $(VENV)/.dev
	$(call install,ON,ON;PYCOMM_CUDA_ARCHITECTURES=$(ARCHITECTURES);CMAKE_CUDA_FLAGS=--Werror=all-warnings)
	@$(BIN)/python -m pytest tests/python/test_cuda.py

# An editable install. Its build directory is kept, so that only changed files are compiled, and the C++ tests
# ($(1): ON or OFF) link the same library as the module. $(2) turns the CUDA kernels on or off.
define install
@echo "== build"
@SKBUILD_BUILD_DIR=build \
  SKBUILD_CMAKE_DEFINE="PYCOMM_TESTS=$(1);PYCOMM_CUDA=$(2)" \
  $(PIP) install --no-build-isolation --no-deps -e .
endef

# ---- the environment: rebuilt when pyproject.toml changes ----
$(VENV)/.demo: EXTRAS := demo
$(VENV)/.dev: EXTRAS := demo test lint
$(VENV)/.docs: EXTRAS := docs
$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs: $(VENV)/.build
	@echo "== environment: packages for $(EXTRAS)"
	@$(BIN)/python scripts/requirements.py $(EXTRAS) >$@.txt
	@$(PIP) install --no-compile -r $@.txt
	@touch $@

$(VENV)/.build: $(VENV)/.python
	@$(BIN)/python scripts/requirements.py >$@.txt
	@$(PIP) install --no-compile cmake ninja -r $@.txt
	@touch $@

$(VENV)/.python: pyproject.toml scripts/requirements.py
	@python=$$(scripts/find_python) && echo "== environment: $(VENV) with $$($$python --version)" && \
	  rm -rf $(VENV) && $$python -m venv $(VENV)
	@$(PIP) install "pip>=23"
	@touch $@

# torch's own tests of a backend, on pycomm and on Gloo: some seven minutes.
torch-suite: build $(TORCH_VENV)/.done
	@echo "== the tests in torch's wheel"
	@OPENBLAS_NUM_THREADS=1 $(TORCH_VENV)/bin/python tests/pytorch/run_torch_suite.py

$(TORCH_VENV)/.done: $(VENV)/.dev
	@echo "== environment: $(TORCH_VENV)"
	@rm -rf $(TORCH_VENV) && $(BIN)/python -m venv $(TORCH_VENV)
	@$(TORCH_VENV)/bin/python -m pip --disable-pip-version-check -qq install --no-compile torch==$(TORCH)
	@echo "import site; site.addsitedir('$$($(BIN)/$(SITE))')" >"$$($(TORCH_VENV)/bin/$(SITE))/rest.pth"
	@touch $@

# ---- what a reviewer then need not check ----
lint: $(VENV)/.dev
	@echo "== ruff, clang-format, mypy"
	@ruff check -q $(PYTHON_SOURCES)
	@ruff format -q --check $(PYTHON_SOURCES)
	@clang-format --dry-run -Werror $(CXX_SOURCES)
	@mypy --no-error-summary
	@$(BIN)/python scripts/check_sources.py

format: $(VENV)/.dev
	@ruff check -q --fix-only $(PYTHON_SOURCES)
	@ruff format -q $(PYTHON_SOURCES)
	@clang-format -i $(CXX_SOURCES)

# ---- the pages and the docstrings as a site; a broken link or an unknown name is an error
docs: build $(VENV)/.docs
	@echo "== docs"
	@$(BIN)/python -m sphinx -q -W --keep-going -c docs -d build-docs/.doctrees . build-docs
	@echo "build-docs/index.html"

# ---- pycomm/_native.pyi is generated from the module ----
stubs: build
	@$(BIN)/python scripts/stubs.py write

check-stubs: build
	@$(BIN)/python scripts/stubs.py check

# ---- ThreadSanitizer for code with threads, AddressSanitizer with UndefinedBehaviorSanitizer for code with pointers;
# the proofs of schedules have neither, and would take minutes
sanitize: $(VENV)/.dev
	@echo "== C++ tests, thread sanitizer"
	@scripts/ctest build-thread 'transport|runtime' -DPYCOMM_SANITIZE=thread
	@echo "== C++ tests, address and undefined-behaviour sanitizers"
	@scripts/ctest build-address 'common|kernels|transport|runtime' -DPYCOMM_SANITIZE=address

# ---- on a machine with a GPU. No environment is made and nothing is fetched: the machine's own Python must
# have NumPy, ml_dtypes, torch, pybind11, CMake, pytest, pytest-benchmark, pytest-timeout, hypothesis and rich
# (CuPy too, to test it). The modules are built into pycomm/, for the GPU of the machine. OUT: where bench-gpu
# writes gpu.json and gpu.png.
GPU_PYTHON := python3
GPU_RUN := PYTHONPATH=$(CURDIR):$(CURDIR)/tests/gpu $(GPU_PYTHON)
SANITIZED := places or mixed or residuals or fused or shared or topk
OUT ?= .

test-gpu: build-gpu-modules
	@echo "== GPU tests"
	@$(GPU_RUN) -m pytest tests/gpu -p no:cacheprovider
	@command -v compute-sanitizer >/dev/null || echo "== skipped: no compute-sanitizer on this machine"
	@for tool in $$(command -v compute-sanitizer >/dev/null && echo memcheck racecheck); do \
	  echo "== compute-sanitizer, $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=$(CURDIR):$(CURDIR)/tests/gpu compute-sanitizer --tool $$tool \
	    --report-api-errors no --error-exitcode 1 --print-limit 5 $(GPU_PYTHON) -m pytest tests/gpu \
	    -p no:cacheprovider -o timeout=1800 -k '($(SANITIZED)) and not graph' || exit 1; \
	done

bench-gpu: build-gpu-modules
	@$(GPU_RUN) -m pycomm bench kernels --device cuda --json $(OUT)/gpu.json --plot $(OUT)/gpu.png

build-gpu-modules:
	@echo "== build, for the GPU of this machine"
	@cmake -S . -B build-gpu -DCMAKE_BUILD_TYPE=Release -DPYCOMM_CUDA=ON \
	  -DPYCOMM_CUDA_ARCHITECTURES=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .) \
	  -DPython_EXECUTABLE=$$($(GPU_PYTHON) -c 'import sys; print(sys.executable)') \
	  -Dpybind11_DIR=$$($(GPU_PYTHON) -m pybind11 --cmakedir) -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/pycomm >/dev/null
	@cmake --build build-gpu --parallel $$(nproc) --target _native _cuda

clean:
	rm -rf build build-* $(VENV) $(VENV)-torch-*
