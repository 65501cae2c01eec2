# Everything happens in .venv; it is (re)made when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check fmt bench accuracy coverage clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.all  ## convert, distil, export, compile and check the bundled digits CNN
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev  ## the fast tests
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(VENV)/.dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: $(VENV)/.dev  ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## time adder layers against convolutions
	$(BIN)/python benchmarks/kernels.py forward
	$(BIN)/python benchmarks/kernels.py training

accuracy: $(VENV)/.dev  ## measure conversions at several budgets
	$(BIN)/python benchmarks/accuracy.py

coverage: $(VENV)/.zoo  ## convert torchvision's and timm's networks, write docs/coverage.md (hours; goes on if cut)
	$(BIN)/python benchmarks/coverage.py

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build dist out *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "anncvt needs Python 3.10 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.all: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing anncvt with its dependencies into $(VENV) (some minutes the first time)"
	$(INSTALL) -e '.[all]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing anncvt with its development tools into $(VENV) (some minutes the first time)"
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.all

$(VENV)/.zoo: $(VENV)/.dev
	$(INSTALL) -e '.[zoo]'
	@touch $@
