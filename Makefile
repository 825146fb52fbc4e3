PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

# The whole circle on generated phantoms, offline: train, predict, score, picture.
demo: .venv/installed
	rm -rf demo
	$(BIN)/medseg demo --output demo

test: lint
	$(BIN)/pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
