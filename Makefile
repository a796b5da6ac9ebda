# Everything is set up inside the project: packages in .venv, kernels in .cache.
#
# The package is installed as a user's would be, not in place, and the tests run on the installed one: they then also
# find what is missing from the wheel. (pytest alone, without this Makefile, takes the source tree.)
#
#   make test        lint, then all tests, on kernels for all capabilities; ARGS="-k linear -x" goes to pytest
#   make demo        prune a network on real scans, against torch.nn.utils.prune
#   make bench       everything against torch, in five minutes; rewrites bench/results and the README's figures
#   make lint        formatting, lint and types
#   make format      put the formatting right
#   make sanitize    the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer, on all capabilities
#   make fence       the kernel tests with memory that ends, and then that begins, at a page that cannot be touched: that
#                    shows what masked loads and stores do outside of it, which the sanitizers do not see
#   make ahead       the kernel tests on a library as it is built ahead of time: that is also what a CPU with AVX-512 but
#                    without its dot products and VBMI2 takes, which the other tests do not see where the CPU has them
#   make cuda-check  the CUDA kernels without a GPU: emulated, and as compiled; part of make test where nvcc is there
#   make clean       remove everything that make has made

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
# Two jobs: the kernels are compiled while what is not needed for that is installed, and while the linters run.
MAKEFLAGS += --no-builtin-rules --jobs=2

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --quiet --constraint requirements/torch.txt

SOURCES := $(shell find masked_ops csrc -type f -not -path '*/__pycache__/*' -not -name '.*') \
    $(wildcard README.md) LICENSE MANIFEST.in pyproject.toml setup.py
KERNEL_TESTS := $(sort $(foreach name,linear results convolution sparse compact pointwise depthwise packed apply_mask pattern autograd errors,\
    $(wildcard tests/test_$(name)*.py)))
CPP := $(shell find csrc tests/cuda tests/fake_cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu') tests/fence.c

CUDA_TOOLS := .cache/cuda-tools/.ready

export MASKED_OPS_CACHE_DIR ?= $(CURDIR)/.cache/masked_ops
# pip's bytecode of everything takes longer than Python's of what is imported.
export PIP_COMPILE := 0
export PYTHONDONTWRITEBYTECODE :=

.PHONY: test demo bench kernels lint format sanitize fence ahead cuda-check clean

test: export MASKED_OPS_BUILD_CAPABILITIES := all
test: export MASKED_OPS_REQUIRE_BUILD := 1
# Several processes, each with torch's threads, which spin for work where they should make room: that takes 2.7 times
# as long.
test: export OMP_WAIT_POLICY := PASSIVE
test: kernels lint $(if $(shell command -v nvcc),$(CUDA_TOOLS))
	@cd .venv && bin/python -m masked_ops
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

demo: kernels .venv/.demo
	@cd .venv && bin/python -m masked_ops
	$(BIN)/python examples/prune_digits.py

# On an idle machine, or the figures mean little.
bench: .venv/.bench
	$(BIN)/python bench/linear.py --shapes bench/shapes/linear_short.txt --sparsity 0.5 0.8 0.9 0.95 0.99 \
	    --json bench/results/linear.json
	$(BIN)/python bench/plot.py bench/results/linear.json --readme
	$(BIN)/python bench/convolution.py --shapes bench/shapes/convolution_short.txt --sparsity 0.5 0.8 0.9 0.95 \
	    --seconds 0.5 --json bench/results/convolution.json
	$(BIN)/python bench/plot.py bench/results/convolution.json --readme
	$(BIN)/python bench/model.py --seconds 4 --json bench/results/model.json
	$(BIN)/python bench/plot.py bench/results/model.json --readme
	$(BIN)/python bench/memory.py --json bench/results/memory.json
	$(BIN)/python bench/overhead.py --json bench/results/overhead.json

# From the source tree, which has what the installed package will have: that then finds the library in the cache. NumPy
# may not be there yet, and is not needed.
kernels: .venv/.torch
	@PYTHONPATH=. $(BIN)/python -W "ignore:Failed to initialize NumPy" -c "import masked_ops; masked_ops.is_available()"

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: .venv/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The library is instrumented, Python is not: the sanitizer's runtime has to be there before it, and with it libstdc++,
# whose exceptions it intercepts. Python and torch free less than they allocate, so that leaks say nothing here. The
# tests ask for more memory than there is: as elsewhere, that has to be torch's error. A fault ends the process: abort,
# for then pytest prints where in Python it was, and leave stderr alone, where the report goes.
sanitize: export MASKED_OPS_SANITIZE := 1
sanitize: export MASKED_OPS_BUILD_CAPABILITIES := all
sanitize: export MASKED_OPS_REQUIRE_BUILD := 1
sanitize: .venv/.test
	@cd .venv && bin/python -c "from masked_ops import _build; _build.build()"
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:abort_on_error=1 \
	UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1 \
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	$(BIN)/pytest -p no:cacheprovider --capture=sys $(or $(ARGS),$(KERNEL_TESTS))

# The library is compiled as always, but for memory of its own, which ends where what was asked for does.
fence: export MASKED_OPS_FENCE := 1
fence: export MASKED_OPS_BUILD_CAPABILITIES := all
fence: export MASKED_OPS_REQUIRE_BUILD := 1
fence: .venv/.test .cache/fence/fence.so
	@cd .venv && bin/python -c "from masked_ops import _build; _build.build()"
	for end in back front; do \
	    FENCE=$$end LD_PRELOAD=$(CURDIR)/.cache/fence/fence.so \
	    $(BIN)/pytest -p no:cacheprovider --capture=sys $(or $(ARGS),$(KERNEL_TESTS)); \
	done

.cache/fence/fence.so: tests/fence.c
	@mkdir -p $(@D)
	$(CC) -std=c11 -O1 -g -Wall -Wextra -Werror -shared -fPIC -o $@ $<

ahead: export MASKED_OPS_NO_BUILD := 1
ahead: export MASKED_OPS_REQUIRE_BUILD := 1
ahead: .venv/.test
	@rm -rf .cache/ahead build
	MASKED_OPS_PREBUILD=1 $(INSTALL) --no-deps --no-build-isolation --target .cache/ahead .
	@rm -rf build *.egg-info
	PYTHONPATH=$(CURDIR)/.cache/ahead $(BIN)/pytest -p no:cacheprovider $(or $(ARGS),$(KERNEL_TESTS))

cuda-check: .venv/.test $(CUDA_TOOLS)
	MASKED_OPS_CUDA_CHECK=1 $(BIN)/pytest $(or $(ARGS),tests/cuda tests/test_cuda_build.py tests/test_cuda_host.py)

clean:
	rm -rf .venv .cache build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- set-up ---------------------------------------------------------------------------------------------------------

# torch first, so that nothing else decides on its version, with what compiles the kernels.
.venv/.torch: requirements/torch.txt
	@requirements/system.sh $(PYTHON)
	$(PYTHON) -m venv .venv
	$(PIP) install --requirement requirements/torch.txt ninja pybind11 filelock
	@touch $@

.venv/.%: .venv/.torch $(SOURCES)
	@rm -rf build
	$(INSTALL) ".[$(if $(filter test,$*),test$(comma)lint,$*)]"
	@rm -rf build *.egg-info
	@touch $@

# Packages of which only files are read; beside torch they would change what it does.
$(CUDA_TOOLS): requirements/cuda-tools.txt .venv/.torch
	@rm -rf $(@D)
	$(PIP) install --quiet --no-deps --target $(@D) --requirement $<
	@touch $@

comma := ,
