PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

# The whole circle on generated phantoms, offline: train, predict, score, picture.
demo: .venv/installed
	rm -rf demo
	$(BIN)/medseg demo --output demo

# One process a core, each on one thread: faster than one process on all of them.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
