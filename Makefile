# The commands of this repository, for a machine with make. The checks themselves are listed in
# start.py, which README, CI and the targets below call; everything runs in its .venv-test.

.DEFAULT_GOAL := help
.PHONY: help install check lint format type test docs table maps bench train notebooks explain clean

START := python3 start.py
BIN := .venv-test/bin
PROCESSES := 2

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## Make the environment .venv-test: the library, tests and tools
	@$(START) install

check: ## Every check, as CI runs them
	@$(START) test

lint: ## Style and format, changing nothing
	@$(START) test --only lint --only format

format: install ## Put the code into the common format, and mend what ruff can
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

type: ## Types
	@$(START) test --only type

test: ## The tests
	@$(START) test --only pytest

docs: ## Build the documentation site into build/site
	@$(START) docs

table: install ## Measure what docs/SCORES.md reports, and print it (half an hour)
	$(BIN)/python benchmarks/scores.py measure --start 60 --scenes 200 --signs 8
	$(BIN)/python benchmarks/scores.py table --start 60 --scenes 200

maps: install ## Measure what docs/RESULTS.md reports, and print it (hours)
	$(BIN)/python benchmarks/maps.py measure
	$(BIN)/python benchmarks/maps.py table

bench: install ## Measure the first part of docs/COST.md, and write it (five minutes)
	$(BIN)/python benchmarks/cost.py --write

train: install ## Train the embedded model anew into runs/mini (hours); goes on where it stopped
	$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) -m benchmarks.mini.training --out runs/mini

notebooks: ## Run the tutorials and keep what they show
	@$(START) notebooks

explain: ## Explain an image with the embedded model, into explanation/
	@$(START) explain

clean: ## Remove environments, caches and build leftovers (not runs/)
	rm -rf .venv-explain .venv-test .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf build dist captum_dcam.egg-info
