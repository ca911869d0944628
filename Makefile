# Everything a user or a machine does with this repository. `make` alone lists it.
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready
SOURCES := novajax bench tests checkpoints

# The first interpreter of 3.12 or newer: $PYTHON, the usual names, then what pyenv keeps.
FIND_PYTHON := for p in "$$PYTHON" python3.14 python3.13 python3.12 python3 python "$$HOME"/.pyenv/versions/*/bin/python3; do \
	[ -n "$$p" ] && command -v "$$p" >/dev/null 2>&1 \
	&& "$$p" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1 && { echo "$$p"; break; }; done

.PHONY: help setup serve test test-all check lint format bundled bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): requirements.lock pyproject.toml
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then echo "NovaJAX needs Python 3.12 or newer with venv; none was found. Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	echo "setting up $(VENV) with $$("$$python" --version) (a minute or two, once)"; \
	"$$python" -m venv --clear $(VENV) \
	&& $(PY) -m pip install --quiet --require-hashes -r requirements.lock \
	&& $(PY) -m pip install --quiet --no-deps --no-build-isolation --editable . \
	&& touch $(STAMP)

setup: $(STAMP) ## create the environment (done by the other targets)

serve: $(STAMP) ## serve the bundled model on http://127.0.0.1:8000
	$(PY) -m novajax.launch --config=configs/nova-small.yaml $(ARGS)

test: $(STAMP) ## lint and the whole test suite but what is marked slow
	$(MAKE) --no-print-directory check

test-all: $(STAMP) ## also the tests that take minutes
	$(PY) -m pytest -m "" $(ARGS)

check: $(STAMP) lint
	$(PY) -m pytest -m "not slow" $(ARGS)

lint: $(STAMP) ## ruff, pyright, import rules
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

format: $(STAMP) ## let ruff rewrite what it can
	$(VENV)/bin/ruff format $(SOURCES)
	$(VENV)/bin/ruff check --fix $(SOURCES)

bundled: $(STAMP) ## train the bundled models again from their recipes
	$(PY) -m novajax.train --recipe=checkpoints/recipe/nova-small.yaml --output=checkpoints/nova-small
	$(PY) -m novajax.train --recipe=checkpoints/recipe/nova-draft.yaml --output=checkpoints/nova-draft

bench: $(STAMP) ## throughput and latency of the bundled model on this machine
	$(PY) -m bench.latency --model=checkpoints/nova-small
	$(PY) -m bench.throughput --model=checkpoints/nova-small

clean: ## remove the environment and caches
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
