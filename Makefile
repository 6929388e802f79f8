# `make help` lists the targets. Everything runs in $(VENV), which the first target that needs it creates.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
BENCHMARKS := $(filter-out benchmarks/common.py benchmarks/make_readme.py,$(wildcard benchmarks/*.py))

# A process per core, and a thread per process: the tests' models are too small to share among threads.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Stamps: what is installed is installed again only when what it is made from changes.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## attack a gradient, defend it, attack again; writes gradguard-report/
	$(BIN)/gradguard demo

test: lint ## the linters, then all tests on WORKERS processes (default 2)
	$(PYTEST)

test-fast: $(INSTALLED_DEV) ## tests/unit alone: what a change is most likely to break, in some two minutes
	$(PYTEST) tests/unit

lint: $(INSTALLED_DEV) ## ruff (rules and format), mypy, the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED_DEV) ## bring the code into ruff's format and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED_DEV) ## build the site into site/, warnings being errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(INSTALLED_DEV) ## every benchmark script with --quick, results kept, benchmarks/README.md regenerated
	set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script --quick --save; done
	$(BIN)/python benchmarks/make_readme.py

clean: ## remove what is made here, the virtual environment included
	rm -rf $(VENV) build dist site gradguard-report lightning_logs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(INSTALLED_DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@ $(INSTALLED)
