# What a newcomer types. Everything happens in .venv and build/; `make clean` removes both.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP_BUILD := build/cpp
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SOURCES := $(shell find csrc -type f) $(shell find python -name '*.py' -o -name '*.pyi') CMakeLists.txt pyproject.toml
CPP_SOURCES := $(shell find csrc tests/cpp -name '*.cc' -o -name '*.h' -o -name '*.cu')

.PHONY: build demo test test-cpp test-python lint format stubs docs soak gpu-check wheel clean

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

test-cpp: $(VENV)/.requirements
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(CPP_BUILD) -G Ninja -DROUNDEL_TESTS=ON -DROUNDEL_PYTHON=OFF -DROUNDEL_CUDA=OFF
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(CPP_BUILD)
	$(CPP_BUILD)/roundel_tests

test-python: build
	$(BIN)/python -m pytest -m "not soak"

soak: build
	$(BIN)/python -m pytest -s -m soak

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

# Generated files that are kept: the module's type stubs and docs/env.md.
stubs docs: build
	$(BIN)/python -m pip install --quiet pybind11-stubgen
	$(BIN)/pybind11-stubgen roundel._core -o build/stubs
	cp build/stubs/roundel/_core.pyi python/roundel/_core.pyi
	$(BIN)/python docs/make_env.py > docs/env.md

wheel: $(VENV)/.requirements
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

# On a machine with a GPU, whose own Python has torch with CUDA, pybind11 and scikit-build-core; nothing is fetched.
gpu-check:
	bash bench/gpu_check.sh

clean:
	rm -rf $(VENV) build dist
