# `make demo` and `make test` do everything on a fresh machine: they install into .venv and nowhere else.
#   make PYTHON=python3.12 test      another Python (3.11 or newer)
#   make TORCH=/wheels/torch.whl ..  another build of torch; any arguments that pip understands will do

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
COMMA := ,
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-long coverage lint pytest sanitize sanitize-threads install clean

help:
	@echo "make demo    train a regularizer that passes TV, recover images, write demo-report/"
	@echo "make test    ruff, pyright, then the tests"
	@echo "make test-long         the tests at full size that make test runs at a smaller one"
	@echo "make coverage          the same tests with line coverage, at least 90 % (takes twice the time)"
	@echo "make docs    build the documentation into site/"
	@echo "make lint    ruff and pyright alone"
	@echo "make sanitize          the kernels' tests under the address and undefined-behavior sanitizers"
	@echo "make sanitize-threads  the same under the thread sanitizer"
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

# Warnings are errors: a link that leads nowhere, a name without a docstring.
docs: $(STAMP)
	@$(BIN)/python -c "import latex2mathml, material, mkdocstrings" 2>/dev/null || \
	  $(BIN)/python -m pip install --disable-pip-version-check -q -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The documentation is in site/index.html"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Workers share the cores, one thread each. Hypothesis draws the same examples at every run, and fresh ones if pytest is
# called without CI set (tests/conftest.py).
pytest test-long coverage sanitize sanitize-threads: export CI ?= 1
pytest: $(STAMP)
	$(BIN)/pytest -n auto --maxprocesses=8 -m "not long"

# Static checks first: they fail in seconds, and pytest's closing lines come last.
test: lint
	@$(MAKE) --no-print-directory pytest

# The tracer doubles the CPU time: the interpreted GPU kernels make many small calls.
coverage: $(STAMP)
	$(BIN)/pytest -n auto --maxprocesses=8 -m "not long" --cov=deepreg_fast --cov-report=term:skip-covered --cov-fail-under=90

test-long: $(STAMP)
	$(BIN)/pytest -n auto --maxprocesses=8 -m long

# The kernels' tests on an extension that watches its memory and its arithmetic, or its threads, in a copy of the tree.
SANITIZED := build/sanitized
WATCHED := git ls-files -co --exclude-standard csrc deepreg_fast kernels tests setup.py pyproject.toml README.md LICENSE
define sanitized
rm -rf $(SANITIZED)/$(1) && mkdir -p $(SANITIZED)/$(1) && $(WATCHED) | tar -cT - | tar -xC $(SANITIZED)/$(1)
cd $(SANITIZED)/$(1) && DEEPREG_FAST_SANITIZE=$(1) $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
cd $(SANITIZED)/$(1) && PYTHONPATH=. LD_PRELOAD="$(foreach lib,$(2),$$($(CXX) -print-file-name=lib$(lib).so))" \
  $(CURDIR)/$(BIN)/python -m pytest -q -n 2 tests/test_cpu_backend.py tests/test_cpu_srm.py tests/test_cpu_tv.py tests/test_cpu_vectors.py tests/test_tomography.py
endef

sanitize: export ASAN_OPTIONS := detect_leaks=0
sanitize: $(STAMP)
	$(call sanitized,address$(COMMA)undefined,asan ubsan)

sanitize-threads: export TSAN_OPTIONS := halt_on_error=1 suppressions=$(CURDIR)/csrc/cpu/tsan.supp
sanitize-threads: export OMP_NUM_THREADS := 2
sanitize-threads: $(STAMP)
	$(call sanitized,thread,tsan)

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
