# Every target creates the environment .venv from plain python3, or reuses it.
#
#   make train ARGS="--training.seed 1"     any option of train_ddpm.py
#   make train TORCH="torch>=2.10"          another PyTorch; the default is the one used for all measurements
#   make test WORKERS=8                     processes that share the tests, one per core
#   make bench ARGS="--only train sample"   some rows of the benchmark

PYTHON ?= python3
TORCH ?= torch==2.13.0
CONFIG ?= configs/digits_8.yaml
ARGS ?=
WORKERS ?= 2

VENV := .venv
TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' "$(TORCH)" | cksum | cut -d ' ' -f 1)
RUN := $(VENV)/bin/python -m
SOURCES := ddpm_hf train_ddpm.py

# The digits network is too small for more cores, and a fixed number of threads makes results reproducible.
# accelerate-launch is `accelerate launch` without the imports of Accelerate's other commands.
LAUNCH := $(VENV)/bin/accelerate-launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process 2

.DEFAULT_GOAL := help
.PHONY: help train test bench lint types test-slow clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

train: $(VENV)/.train ## Train on the embedded digits, sample and evaluate; results in outputs/digits
	$(LAUNCH) train_ddpm.py --config $(CONFIG) $(ARGS)

test: lint types ## Lint, check types and run all tests except the slow ones
	OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  -m "not slow and not gpu" $(ARGS)

bench: $(VENV)/.dev ## Measure the speed beside other trainers on this CPU; results in docs/performance.md
	$(VENV)/bin/python benchmarks/bench.py $(ARGS)
	$(VENV)/bin/python docs/make_performance.py

lint: $(VENV)/.dev ## Check style and formatting
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/.dev ## Check types
	$(RUN) mypy $(SOURCES)

test-slow: $(VENV)/.dev ## Run the slow tests
	OMP_NUM_THREADS=1 $(RUN) pytest -m "slow and not gpu" $(ARGS)

clean: ## Remove the environment and the caches; outputs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov

# Each stamp is touched last, so an interrupted installation is repeated.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "ddpm_hf needs Python 3.10 or newer as $(PYTHON); select another one with make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv)" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(TORCH_STAMP): $(VENV)/.made
	$(RUN) pip install --quiet "$(TORCH)" || \
	  echo "$(TORCH) is not available for this Python; installing the newest release that is" >&2
	@touch $@

$(VENV)/.train: $(TORCH_STAMP) setup.cfg
	$(RUN) pip install --quiet --editable ".[recognition]"
	@touch $@

$(VENV)/.dev: $(TORCH_STAMP) setup.cfg
	$(RUN) pip install --quiet --editable ".[dev]"
	@touch $@
