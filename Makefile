# Each command does its own set-up: it needs Python 3.11 or newer, and a package index or wheels that pip can reach.

PYTHON ?= python3
VENV ?= .venv
# For another build of PyTorch, e.g. TORCH="torch==2.13.0 --index-url URL".
TORCH ?= torch==2.13.0
# Further flags of pretrain.py for the quickstart, e.g. ARGS="--lr 1e-2".
ARGS ?=
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help venv quickstart quickstart-short test test-long test-cluster lint docs clean

help:
	@echo 'make quickstart        train a small GPT from nothing: corpus, tokenizer, data, training, sample of text'
	@echo 'make test              tests that any two cores run in less than 15 minutes'
	@echo 'make test-long         all tests but those that need a GPU: the whole matrix of layouts'
	@echo 'make test-cluster      on a real SLURM (slurm-wlm, munge) and two network namespaces, both as root'
	@echo 'make lint              ruff, mypy, and whether docs/configuration.md is up to date'
	@echo 'make docs              the documentation as a site, in build/site'
	@echo 'make quickstart-short  the quickstart with a few iterations, to see that all of it works'
	@echo 'make venv              only the environment, in $(VENV)'
	@echo 'make clean             remove the folders of the quickstart and of tools; the environment stays'
	@echo
	@echo 'variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH="$(TORCH)" ARGS="flags of pretrain.py for the quickstart"'

# What runs the package, and what else tests and linters need: the quickstart does not wait for the latter.
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

$(RUN_STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo 'error: no $(PYTHON) here; name one: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo '==> environment: $(VENV)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

venv: $(DEV_STAMP)

quickstart: $(RUN_STAMP)
	@$(BIN)/python tools/quickstart.py $(ARGS)

quickstart-short: $(RUN_STAMP)
	@$(BIN)/python tools/quickstart.py --short $(ARGS)

# Two processes, each with a pool of ranks: one file's tests share theirs.
test: $(DEV_STAMP)
	$(BIN)/python -m pytest -m 'not long' -n 2 --dist loadfile

test-long: $(DEV_STAMP)
	$(BIN)/python -m pytest -m 'not gpu'

test-cluster: $(DEV_STAMP)
	$(BIN)/python -m pytest tests/cluster

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megatron_mup/config megatron_mup/parametrization
	@$(BIN)/python -m megatron_mup.config.docs | diff -u docs/configuration.md - || { \
	    echo 'error: docs/configuration.md is old: python -m megatron_mup.config.docs > docs/configuration.md' >&2; exit 1; }

docs: $(RUN_STAMP)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf quickstart build dist .pytest_cache .ruff_cache .mypy_cache
