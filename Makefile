# What a newcomer types. Everything happens in .venv and build/; `make clean` removes both.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where pip has built the core, by version of Python: tests in C++ are linked with the same objects.
CORE_BUILD = $(or $(firstword $(shell ls -td build/cp*/ 2> /dev/null)),$(error no build in build/: run make build))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SOURCES := $(shell find csrc -type f) $(shell find python -name '*.py' -o -name '*.pyi') CMakeLists.txt pyproject.toml
CPP_SOURCES := $(shell find csrc tests/cpp tests/fuzz -name '*.cc' -o -name '*.h' -o -name '*.cu')

.PHONY: build demo test test-cpp test-python lint format sanitize fuzz stubs docs soak gpu-check wheel clean

build: $(VENV)/.installed

$(VENV)/.requirements: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	touch $@

# Trains a real model twice: on one process, then on two.
demo: build
	@echo "--- one process"
	$(BIN)/python examples/digits.py
	@echo "--- two processes"
	$(BIN)/roundelrun --no-prefix -np 2 $(BIN)/python examples/digits.py

test: test-cpp test-python

test-cpp: build
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -DROUNDEL_TESTS=ON $(CORE_BUILD) > /dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(CORE_BUILD) --target roundel_tests
	$(CORE_BUILD)roundel_tests

test-python: build
	$(BIN)/python -m pytest -m "not soak" -n 2 --dist loadgroup

# The long ones: large plans, hundreds of kills, 100,000 random collectives, growth. About an hour.
soak: test-cpp build
	$(CORE_BUILD)roundel_tests soak
	$(BIN)/python -m pytest -s -m soak

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

DEBUG_BUILD = -S . -G Ninja -DROUNDEL_PYTHON=OFF -DROUNDEL_CUDA=OFF -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1"
NO_ASLR = setarch $(shell uname -m) -R# some kernels place mappings where TSan cannot have them

# The tests that cross threads, sockets and shared memory, under the sanitizers. SANITIZE_TESTS= runs all C++ tests.
SANITIZE_TESTS ?= engine optim pool_takes ranks_as_threads stranger handshake refused member header garbage memory card verdict
sanitize: $(VENV)/.requirements
	PATH="$(CURDIR)/$(BIN):$$PATH"; set -e; for s in address,undefined thread; do \
	  cmake -B build/$${s%,*} $(DEBUG_BUILD) -DROUNDEL_TESTS=ON -DROUNDEL_SANITIZE=$$s > /dev/null; \
	  cmake --build build/$${s%,*} --target roundel_tests; \
	  for t in $(or $(SANITIZE_TESTS),""); do $(NO_ASLR) build/$${s%,*}/roundel_tests $$t; done; \
	done

# Every target for its share of SECONDS, from the kept corpus. With clang++: make fuzz CXX=clang++ (libFuzzer).
SECONDS ?= 60
FUZZ_TARGETS := frame handshake rendezvous control
fuzz: $(VENV)/.requirements
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -B build/fuzz $(DEBUG_BUILD) -DCMAKE_CXX_COMPILER=$(CXX) -DROUNDEL_FUZZ=ON -DROUNDEL_SANITIZE=address,undefined > /dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/fuzz --target $(addprefix fuzz_,$(FUZZ_TARGETS))
	set -e; for t in $(FUZZ_TARGETS); do share=$$(( $(SECONDS) / 4 + 1 )); \
	  if nm build/fuzz/fuzz_$$t | grep -q LLVMFuzzerRunDriver; then \
	    mkdir -p build/fuzz/found/$$t; build/fuzz/fuzz_$$t -max_total_time=$$share -verbosity=0 build/fuzz/found/$$t tests/fuzz/corpus/$$t; \
	  else build/fuzz/fuzz_$$t $$share tests/fuzz/corpus/$$t; fi; \
	done

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

# Generated files that are kept: the module's type stubs, docs/env.md, and the tables of docs/horovod.md.
stubs docs: build
	$(BIN)/python -m pip install --quiet pybind11-stubgen
	$(BIN)/pybind11-stubgen roundel._core -o build/stubs
	cp build/stubs/roundel/_core.pyi python/roundel/_core.pyi
	$(BIN)/python docs/make_env.py > docs/env.md
	$(BIN)/python docs/make_horovod.py

wheel: $(VENV)/.requirements
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

# On a machine with a GPU, whose own Python has torch with CUDA, pybind11 and scikit-build-core; nothing is fetched.
gpu-check:
	bash bench/gpu_check.sh

clean:
	rm -rf $(VENV) build dist
