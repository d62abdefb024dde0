# `make demo` and `make test` do everything on a fresh machine: they install into .venv and nowhere else.
#   make PYTHON=python3.12 test      another Python (3.11 or newer)
#   make TORCH=/wheels/torch.whl ..  another build of torch; any arguments that pip understands will do

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint pytest install clean

help:
	@echo "make demo    train a small regularizer, recover images, write demo-report/"
	@echo "make test    ruff, pyright, then the whole test suite with coverage"
	@echo "make lint    ruff and pyright alone"
	@echo "make install set up .venv"
	@echo "make clean   remove .venv, build products and caches"

# -e builds the extension; it is built anew when its sources change.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/cpu/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "deepreg-fast needs Python 3.11 or newer, but '$(PYTHON)' is not one ($$($(PYTHON) --version 2>&1)); try 'make PYTHON=python3.12'." >&2; \
	  exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/deepreg-fast demo --out demo-report

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Workers share the cores, one thread each (tests/conftest.py).
pytest: $(STAMP)
	$(BIN)/pytest -n auto --maxprocesses=8 --cov=deepreg_fast --cov-report=term:skip-covered --cov-fail-under=90

# Static checks first: they fail in seconds, and pytest's closing lines come last.
test: lint
	@$(MAKE) --no-print-directory pytest

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
