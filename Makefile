# make run    the main job: train SpreadLoss on 5,000 MNIST images and evaluate the representation
# make test   linters, types and the everyday tests;  make test-all: what takes longer
# Set-up (virtual environment, pinned packages, extension) happens once and again only when its inputs change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/mnist_coarse_spread.yaml
# Where the python packages and the extension of this checkout were last brought up to date.
PACKAGES := $(VENV)/.packages
EXTENSION := $(VENV)/.extension
SOURCES := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))
NATIVE := $(shell find csrc tests -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: run test test-all lint unit setup cuda-all gpu-check matrix oldest clean
.DELETE_ON_ERROR:

# Waiting threads sleep: on a machine that others use, too, threads that spin take the processors from one another.
run: setup
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(BIN)/accelerate launch pysupcon/train.py --config $(CONFIG)
	@echo "to use pysupcon, accelerate and python from here: source $(VENV)/bin/activate"

test: lint unit

setup: $(EXTENSION)

$(PACKAGES): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch setuptools wheel pybind11 ninja
	touch $@

$(EXTENSION): $(PACKAGES) setup.py $(wildcard csrc/*.py) $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation -c constraints.txt -e '.[train,dev]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/mypy

# One thread per worker: the tests that need more set their own number.
unit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow"

test-all: setup cuda-all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m slow

# Every CUDA architecture that the compiler at hand knows; nothing to do where there is no nvcc.
cuda-all: setup
	PYSUPCON_CUDA_ARCHS=all $(BIN)/python setup.py -q build_ext --build-lib build/cuda-all

# On a machine with a GPU, nvcc and torch >= 2.11; needs no network and no make setup. ARGS="--minutes 25": more.
gpu-check:
	$(PYTHON) benchmarks/gpu/gpu_check.py $(ARGS)

# The losses with every Python and torch that is supported: some minutes a pair, 5 GB at a time. ARGS="--slow": more.
matrix:
	$(PYTHON) benchmarks/matrix.py $(ARGS)

# Of these the oldest Python with the oldest torch.
oldest:
	$(PYTHON) benchmarks/matrix.py --pairs 3.10:2.11.0 $(ARGS)

clean:
	rm -rf build pysupcon/*.so
