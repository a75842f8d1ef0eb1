# Everything runs in a virtual environment of its own, made on first use. Needs Python 3.10+ and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BESIDE := tests/backends/triton tests/convert

.PHONY: help test asan capabilities neon demo bench aot gpu nsight lint format doctor clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# torch goes first and pinned: no later requirement may bring another build of it.
$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

# The interpreter of the GPU kernels is single-threaded, as conversion mostly is: they are tested beside the others and
# shown after them. Threads that wait for work must not take the core of the tests beside: spinning, as OpenMP's do
# unless they are told, they made single tests four to eight times as slow.
test: export OMP_WAIT_POLICY := passive
test: $(READY) ## lint and all tests (CPU; GPU tests run where a GPU is)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/python -m pytest $(BESIDE) > .beside-tests.log 2>&1 & beside=$$!; \
	$(BIN)/python -m pytest tests $(addprefix --ignore ,$(BESIDE)); others=$$?; \
	wait $$beside; beside=$$?; cat .beside-tests.log; \
	echo "exit status: tests $$others, $(BESIDE) $$beside"; [ $$others = 0 ] && [ $$beside = 0 ]

asan: $(READY) ## tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m tests.backends.cpu.sanitized

capabilities: $(READY) ## tests of the C++ kernels built for AVX2 and for no vector instructions at all
	TINYTL_CPU_CAPABILITY=AVX2 $(BIN)/python -m pytest -q tests/backends/cpu tests/ops -k "not opcheck and not gradcheck"
	TINYTL_CPU_CAPABILITY=DEFAULT $(BIN)/python -m pytest -q tests/backends/cpu tests/ops -k "not opcheck and not gradcheck"

neon: $(READY) ## the C++ kernels compiled for ARM with a cross compiler, and tested under emulation where one is given
	$(BIN)/python -m tests.backends.cpu.neon

demo: $(READY) ## the main job: six methods on EfficientNet-Lite0, table and two pictures in demo_out/
	$(BIN)/python -m tinytl_kernels compare --out demo_out

bench: $(READY) ## the benchmark suite; results in benchmarks/results/
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/latest.json
	$(BIN)/python -m benchmarks.tables benchmarks/results/latest.json

lint: $(READY) ## what `make test` lints
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(READY) ## rewrite the sources in the house format
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

aot: $(READY) ## every Triton kernel compiled for every GPU it is meant for: registers, spills, bytes moved
	$(BIN)/python -m benchmarks.aot

# With the Python that is there, for a machine whose PyTorch fits its GPU: installs nothing, needs no network.
gpu: ## on a machine with a GPU: answers, sanitizer, bandwidth, steps beside their peers; under 9 minutes
	$(PYTHON) -m benchmarks.gpu

OPERATOR ?= depthwise
SIZE ?=
nsight: ## how ncu and nsys look at one operator (OPERATOR=depthwise SIZE=128x144x56x56), and run where there is a GPU
	$(PYTHON) -m benchmarks.nsight $(OPERATOR) $(SIZE) --profile

doctor: $(READY) ## what this machine offers
	$(BIN)/python -m tinytl_kernels doctor

clean: ## remove the virtual environment and what was made
	rm -rf $(VENV) demo_out build dist *.egg-info .pytest_cache .ruff_cache .benchmarks .hypothesis
