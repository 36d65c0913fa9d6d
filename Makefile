# The pipelines' front door. `make help` lists what there is; the logic is in the package.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXPERIMENTS := $(patsubst pipelines/experiments/%.yaml,%,$(wildcard pipelines/experiments/*.yaml))
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train evaluate generate compare runs ui test check clean $(EXPERIMENTS:%=train-%)

help: ## list the targets
	@grep -hE '^[a-zA-Z%_-]+:.*## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*## "} {sub("%", "NAME", $$1); printf "  make %-14s %s\n", $$1, $$2}'
	@echo "  train-NAME takes NAME from: $(EXPERIMENTS)"

setup: $(STAMP) ## install everything into .venv, at the pinned versions

$(STAMP): pyproject.toml platform/constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint platform/constraints.txt --editable '.[dev]'
	@touch $@

train: train-default ## train the default experiment (ARGS="--model.hidden_size 512" changes settings)

train-%: ## train pipelines/experiments/NAME.yaml

$(EXPERIMENTS:%=train-%): train-%: $(STAMP)
	@$(BIN)/elman train --config pipelines/experiments/$*.yaml $(ARGS)

evaluate: $(STAMP) ## score a model: MODEL=… ARGS="--split test --corpus.name FILE"
	@$(BIN)/elman evaluate $(or $(MODEL),$(error MODEL is a run id, models:/NAME@ALIAS or a checkpoint)) $(ARGS)

generate: $(STAMP) ## continue a prompt: MODEL=… PROMPT="…" ARGS="--temperature 0.7"
	@$(BIN)/elman generate $(or $(MODEL),$(error MODEL is a run id, models:/NAME@ALIAS or a checkpoint)) --prompt "$(PROMPT)" $(ARGS)

compare: $(STAMP) ## put runs side by side: RUNS="RUN RUN …"
	@$(BIN)/elman compare $(or $(RUNS),$(error RUNS is two or more run ids, as make runs lists them)) $(ARGS)

runs: $(STAMP) ## list the recorded runs
	@$(BIN)/elman runs $(ARGS)

ui: $(STAMP) ## open the MLflow UI on the local store
	@$(BIN)/elman ui $(ARGS)

test: $(STAMP) ## run the test suite
	@$(BIN)/python -m pytest -q $(ARGS)

check: $(STAMP) ## lint, types and layers
	@$(BIN)/ruff check platform tests
	@$(BIN)/mypy
	@$(BIN)/lint-imports --config pyproject.toml

clean: ## remove .venv and what tools left behind; runs and the corpus cache stay
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis platform/*.egg-info
	find platform tests -name __pycache__ -type d -prune -exec rm -rf {} +
