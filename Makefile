# `make repro` and `make test` set up all they need: an environment in .venv from uv.lock, by the uv
# that is installed, or else by one that pip puts into .venv.

.PHONY: status test test-all test-gpu torture networks bench docs lint audit clean

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
READY := $(VENV)/.ready
ACTIVE := PATH="$(CURDIR)/$(BIN):$$PATH"
PYTEST := $(ACTIVE) $(BIN)/python -m pytest

include workflow.mk
repro ui: $(READY)

$(READY): uv.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; Python 3.11 to 3.13 is needed (make PYTHON=...)"; exit 2; }
	@set -e; if command -v uv >/dev/null && uv --version >/dev/null 2>&1; then \
	  uv sync --locked --compile-bytecode --python $$($(PYTHON) -c 'import sys; print(sys.executable)'); \
	else \
	  $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet uv; \
	  $(BIN)/uv sync --locked --compile-bytecode --inexact --python $(BIN)/python; \
	fi
	@touch $@

status: $(READY) ## say which stages have other code or parameters than dvc.lock notes
	@$(BIN)/python .ci/stale.py

test: $(READY) ## run the tests of the parts
	@$(PYTEST) -n 2 --dist worksteal -m "not workflow"

test-all: $(READY) ## run all tests, with those of the whole workflow, stopped and killed
	@$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: $(READY) ## the tests that need a GPU
	@$(PYTEST) -m gpu

torture: $(READY) ## the long form of the fault tests: a table and metrics/torture.json
	@$(PYTEST) -v -n 2 --dist worksteal tests/faults --torture

networks: $(READY) ## what holds of torchvision's networks, measured anew: docs/networks.md
	@$(BIN)/python -m pytest tests/test_families.py --networks

bench: $(READY) ## measure the jobs beside plain code: a table and benchmarks/latest.json
	@PATH="$$PATH:$(CURDIR)/$(BIN)" uv sync --quiet --locked --inexact --group bench --python $(BIN)/python
	@$(BIN)/python -m benchmarks

lint: $(READY) ## check style, format, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(READY) ## build the documentation into build/docs; a warning is an error
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

audit: $(READY) ## look the pinned dependencies up among the known vulnerabilities
	@PATH="$$PATH:$(CURDIR)/$(BIN)" uv export --quiet --locked --no-emit-project -o .audit.txt
	@PATH="$$PATH:$(CURDIR)/$(BIN)" uvx pip-audit --strict --require-hashes --disable-pip -r .audit.txt

clean: ## remove the environment
	rm -rf $(VENV) .audit.txt
