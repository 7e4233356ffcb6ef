# `make demo` and `make test` work on a fresh machine: Python 3.10+ with venv and pip, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all check bench docs clean env

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: env            ## train a small hybrid on the standard library's source, at most 4 minutes of training
	$(BIN)/seqloom demo

test: env            ## what CI runs
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: env        ## everything, slow tests too; GPU tests are skipped, and said to be, where there is none
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow"

check: env           ## lint, types, import layers, fast tests
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist worksteal -x tests/test_core.py tests/test_layers.py tests/test_decay_scan.py

bench: env
	$(BIN)/seqloom bench all

docs: env
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site runs .pytest_cache .hypothesis .ruff_cache .mypy_cache
