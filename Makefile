# make demo    a fresh machine -> a program running on its own runtime, offline with the bundled model
# make test    the whole suite, two files at a time (TEST_PROCESSES)
# make kernels compile every GPU kernel ahead of time (minutes) and hold it to its limits
# make bench   a minute of bough beside its peers; BENCH_ARGS="--budget 480 --save" for figures to quote
# make check   what CI checks besides the tests: format, lint, types, layering
#
# PYTHON picks the interpreter of .venv; PIP_ARGS, PIP_* variables and pip's own configuration are passed to pip.
# To bring your own torch (a CUDA build, say): make VENV_ARGS=--system-site-packages ..., or install it into .venv first.

PYTHON ?= python3
VENV_ARGS ?=
PIP_ARGS ?=
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
BENCH_ARGS ?= --quick
VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py $(wildcard kernels/native/*) # compiled when the package is installed
TEST_ENV := OMP_WAIT_POLICY=PASSIVE # spinning threads and two cores do not go together
# Whole files, in their order: what a module's tests share is made once, and the longest tests do not come last.
TEST_SPREAD := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
SOURCES := setup.py lang runtime kernels tests examples benchmarks

.PHONY: demo test kernels check format pocket pocket-eval bench clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/pytest $(TEST_SPREAD) $(PYTEST_ARGS)

kernels: $(VENV)/.installed-dev
	$(BIN)/python -P -m bough.kernels.aot

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	scripts/typetree
	$(BIN)/mypy -p bough
	$(BIN)/mypy benchmarks
	$(BIN)/mypy --explicit-package-bases tests
	$(BIN)/pytest -q tests/test_architecture.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

pocket: $(VENV)/.installed-dev
	$(BIN)/python -P -m bough.runtime.pocket.train --out build/pocket

pocket-eval: $(VENV)/.installed
	$(BIN)/python -P -m bough.runtime.pocket.evaluate

bench: $(VENV)/.installed
	$(BIN)/bough bench $(BENCH_ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)

$(VENV)/.installed: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(BIN)/python -m pip install $(PIP_ARGS) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(BIN)/python -m pip install $(PIP_ARGS) --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .typetree build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
