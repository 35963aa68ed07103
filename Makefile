# Each target does its own set-up from a clean clone. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help demo serve test fast lint format typecheck pytest lock clean
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON := .venv/bin/python
JOBS ?= 2
ARGS ?=
# A file of tests stays in one process, with the programs that it compiles, until another process has nothing left.
PYTEST_FLAGS = -n $(JOBS) --dist worksteal --durations 25 --durations-min 2
INPUTS := pyproject.toml constraints.txt scripts/install.sh scripts/find_python.sh

# An environment whose interpreter has gone is no environment: its stamps are void.
ifneq ($(shell $(PYTHON) -c 'import sys, pip; print(sys.version_info >= (3, 12))' 2>/dev/null),True)
$(shell rm -f .venv/.installed .venv/.installed-serve .venv/.installed-dev)
endif

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.installed ## answer a question about a document with the embedded model
	@$(PYTHON) -m lserve_jax.demo $(ARGS)

serve: .venv/.installed-serve ## serve the embedded model in OpenAI's API; ARGS="--port 8001" passes on, Ctrl-C ends it
	@$(PYTHON) -m lserve_jax.serve $(ARGS)

test: lint typecheck pytest ## everything that must hold: style, types, all tests (15 minutes on two cores)

fast: .venv/.installed-dev ## tests while you work: no benchmarks, GPU kernels or slow ones (3 minutes on two cores, once cached)
	@$(PYTHON) -m pytest $(PYTEST_FLAGS) --ignore tests/bench -m "not hopper and not slow and not sweep" $(ARGS)

lint: .venv/.installed-dev ## ruff: rules and format
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

typecheck: .venv/.installed-dev ## pyright
	@$(PYTHON) -m pyright

pytest: .venv/.installed-dev ## all tests alone; JOBS=n processes, ARGS="-k name" passes on
	@$(PYTHON) -m pytest $(PYTEST_FLAGS) $(ARGS)

format: .venv/.installed-dev ## rewrite the sources as `make lint` wants them
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

lock: ## resolve constraints.txt anew, keeping jax at the tested version
	@scripts/lock.sh

clean: ## remove the environment, builds and caches
	rm -rf .venv .cache .hypothesis .pytest_cache .ruff_cache build dist
	find lserve_jax pallas_kernels tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

.venv/.installed: $(INPUTS)
	@scripts/install.sh
	@touch $@

.venv/.installed-serve: $(INPUTS)
	@scripts/install.sh serve
	@touch $@ .venv/.installed

.venv/.installed-dev: $(INPUTS)
	@scripts/install.sh dev,bench,hub,eval,serve
	@touch $@ .venv/.installed .venv/.installed-serve
