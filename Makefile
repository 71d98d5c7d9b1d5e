# recurx: `make` lists the commands. `make setup` runs by itself before those that need it.

PYTHON ?= python3
VENV   ?= .venv
PY     ?= $(VENV)/bin/python
# Where torch comes from, if not the default index. Without a GPU this saves gigabytes:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

# Processes that run tests.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

PIP     = "$(PY)" -m pip --disable-pip-version-check
SOURCES = $(shell find csrc -name '*.[ch]pp' -o -name '*.h' -o -name '*.cu*' -o -name '*.py')
# The wheel of clang-format has no __main__, and scripts of an environment may not be on PATH.
CLANG_FORMAT = "$(PY)" -c 'import clang_format; clang_format.clang_format()'
CPP     = $(shell find csrc tests -name '*.[ch]pp' -o -name '*.h' -o -name '*.cu*')

# PY=python3 uses an interpreter that already has torch, and installs nothing.
ifeq ($(PY),$(VENV)/bin/python)
DEPS  = $(VENV)/.installed
BUILT = $(VENV)/.built
else
DEPS  =
BUILT = build-with-given-python
endif

.PHONY: help setup test test-fast demo bench bench-ops bench-report clean build-with-given-python
.PHONY: lint lint-python lint-layout lint-cpp format
.DEFAULT_GOAL = help

help:
	@echo 'make setup      create $(VENV), install what recurx needs, compile its engines'
	@echo 'make demo       watch a tiny recursive model learn and refine (about three minutes)'
	@echo 'make test       all tests;  make test-fast leaves the slow ones out'
	@echo 'make lint       ruff and clang-format, check only;  make format rewrites'
	@echo 'make bench      recurx against PyTorch, about eight minutes (python -m recurx bench --help)'
	@echo 'make bench-ops  single operations, by pytest-benchmark'
	@echo 'make bench-report  tables and plots from bench/results/'
	@echo 'make clean      remove $(VENV) and everything that was built'
	@echo
	@echo 'PYTHON=python3.12 picks the interpreter for $(VENV). PY=python3 uses that interpreter'
	@echo 'as it is, without $(VENV). TORCH_INDEX=URL takes torch from another index.'
	@echo 'RECURX_CUDA=0 leaves CUDA out; csrc/native_build.py lists the other switches.'

setup: $(BUILT)

# One process a core, a file of tests in one of them (they share built kernels). One thread each:
# OpenMP teams of several processes would fight for the cores.
PYTEST = OMP_NUM_THREADS=1 "$(PY)" -m pytest -q -n $(WORKERS) --dist loadfile

test: $(BUILT)
	$(PYTEST)

test-fast: $(BUILT)
	$(PYTEST) -m 'not slow'

demo: $(BUILT)
	"$(PY)" -m recurx demo

bench: $(BUILT)
	"$(PY)" -m recurx bench run

bench-ops: $(BUILT)
	"$(PY)" -m pytest -q bench/ops --benchmark-group-by=func,param:batch

bench-report: $(DEPS)
	"$(PY)" -m recurx bench report

lint: lint-python lint-layout lint-cpp

lint-python: $(DEPS)
	"$(PY)" -m ruff check .

lint-layout: $(DEPS)
	"$(PY)" -m ruff format --check .

lint-cpp: $(DEPS)
	$(if $(CPP),$(CLANG_FORMAT) --dry-run --Werror $(CPP))

format: $(DEPS)
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .
	$(if $(CPP),$(CLANG_FORMAT) -i $(CPP))

clean:
	rm -rf "$(VENV)" build dist *.egg-info recurx/_build_info.py recurx/_C.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'recurx needs Python 3.10 or newer: make setup PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo 'This Python cannot create environments: install its venv package' >&2; \
	    echo '(Debian, Ubuntu: apt install python3-venv), or name another with PYTHON=' >&2; exit 1; }
	$(PYTHON) -m venv "$(VENV)"

# Two stamps: dependencies change seldom, csrc/ often. The first step installs recurx editable
# without compiling, the second compiles what changed.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(if $(TORCH_INDEX),$(PIP) install -q -c constraints.txt --index-url "$(TORCH_INDEX)" torch)
	RECURX_NATIVE=0 $(PIP) install -q -c constraints.txt --editable '.[dev]'
	@touch "$@"

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	"$(PY)" csrc/native_build.py
	@touch "$@"

build-with-given-python:
	"$(PY)" csrc/native_build.py
