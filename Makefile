# The pipelines' front door. `make help` lists what there is; the logic is in the package.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps
EXPERIMENTS := $(patsubst pipelines/experiments/%.yaml,%,$(wildcard pipelines/experiments/*.yaml))
SEARCHES := $(patsubst pipelines/searches/%.yaml,%,$(wildcard pipelines/searches/*.yaml))
TOURNAMENTS := $(patsubst pipelines/tournaments/%.yaml,%,$(wildcard pipelines/tournaments/*.yaml))
BENCHMARKS := $(filter-out harness enlarge plots,$(patsubst tests/benchmarks/%.py,%,$(wildcard tests/benchmarks/*.py)))
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup lock doctor train search evaluate generate compare remedy runs ui team-server dashboard test torture check clean
.PHONY: bench bench-plots $(BENCHMARKS:%=bench-%)
.PHONY: $(EXPERIMENTS:%=train-%) $(SEARCHES:%=search-%) $(TOURNAMENTS:%=tournament-%)

help: ## list the targets
	@grep -hE '^[a-zA-Z%_-]+:.*## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*## "} {sub("%", "NAME", $$1); printf "  make %-16s %s\n", $$1, $$2}'
	@echo "  train-NAME takes NAME from: $(EXPERIMENTS)"
	@echo "  search-NAME takes NAME from: $(SEARCHES)"
	@echo "  tournament-NAME takes NAME from: $(TOURNAMENTS)"
	@echo "  bench-NAME takes NAME from: $(BENCHMARKS)"

setup: $(STAMP) ## install everything into .venv, at the pinned versions

$(STAMP): pyproject.toml platform/constraints.txt platform/cpu.txt platform/cuda.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --require-hashes --requirement platform/cpu.txt 2>/dev/null || true  # else the index's build
	$(PIP) --require-hashes --requirement platform/constraints.txt
	@$(BIN)/pip freeze | grep '^torch==.*+cpu' >/dev/null || $(PIP) --require-hashes --requirement platform/cuda.txt
	$(PIP) --no-build-isolation --editable .
	@touch $@

lock: $(STAMP) ## pin what pyproject.toml asks for, with the digests of its files; versions in the lock stay
	@$(BIN)/python platform/lock.py

doctor: $(STAMP) ## is all well here, and does the model compute what it should? (ARGS="--config FILE" or a MODEL)
	@$(BIN)/elman doctor $(ARGS)

train: train-default ## train the default experiment (ARGS="--model.hidden_size 512" changes settings)

train-%: ## train pipelines/experiments/NAME.yaml; goes on with one that was stopped or killed (ARGS="--resume none": does not)

$(EXPERIMENTS:%=train-%): train-%: $(STAMP)
	@$(BIN)/elman train --config pipelines/experiments/$*.yaml --resume auto $(ARGS)

search: search-hidden-units ## how many hidden units: grid search with cross-validation

search-%: ## run pipelines/searches/NAME.yaml (ARGS="--workers 2")

$(SEARCHES:%=search-%): search-%: $(STAMP)
	@$(BIN)/elman search --config pipelines/searches/$*.yaml $(ARGS)

tournament-%: ## which cell is better: pipelines/tournaments/NAME.yaml

$(TOURNAMENTS:%=tournament-%): tournament-%: $(STAMP)
	@$(BIN)/elman compare --tournament pipelines/tournaments/$*.yaml $(ARGS)

remedy: $(STAMP) ## does a run overfit, and what helps: RUN=…
	@$(BIN)/elman remedy $(or $(RUN),$(error RUN is a run id, as make runs lists them)) $(ARGS)

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

team-server: $(STAMP) ## the same for a team, with passwords: the admin's is in MLFLOW_AUTH_ADMIN_PASSWORD
	@$(BIN)/elman ui --team $(ARGS)

dashboard: $(STAMP) ## open optuna-dashboard on the studies
	@$(BIN)/elman dashboard $(ARGS)

test: $(STAMP) ## run the test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

bench: $(BENCHMARKS:%=bench-%) ## measure speed and memory; figures and plots go to build/bench
	@$(BIN)/python tests/benchmarks/plots.py build/bench

bench-plots: $(STAMP) ## draw the figures that build/bench holds
	@$(BIN)/python tests/benchmarks/plots.py build/bench

bench-%: ## one of them: tests/benchmarks/NAME.py

$(BENCHMARKS:%=bench-%): bench-%: $(STAMP)
	@mkdir -p build/bench
	@$(BIN)/python tests/benchmarks/$*.py --json build/bench/$*.json $(ARGS) || case "$*=$$?" in keras_speed=2 | memory=2) ;; *) exit 1 ;; esac  # skipped without Keras, or room on the disk

torture: $(STAMP) ## kill trainings hundreds of times, and compare what comes of them
	@$(BIN)/python tests/torture.py $(or $(ARGS),300)

check: $(STAMP) ## lint, types and layers
	@$(BIN)/ruff check platform tests
	@$(BIN)/mypy
	@$(BIN)/lint-imports --config pyproject.toml

clean: ## remove .venv and what tools left behind; runs and the corpus cache stay
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis platform/*.egg-info
	find platform tests -name __pycache__ -type d -prune -exec rm -rf {} +
