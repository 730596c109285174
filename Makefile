# Each target makes the virtual environment that it needs; PYTHON picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
RUN_ARGS ?= --B 1 --H 8 --S 512
PYTEST_ARGS ?=
BIN = $(VENV)/bin
KERNELS = $(shell find kernels tests/probes tests/compile flashcore_cupy/cpu -name '*.cu' -o -name '*.cuh' -o -name '*.hpp' -o -name '*.cpp' 2>/dev/null)

.PHONY: run test lint docs format clean

run: $(BIN)/python
	rm -rf build
	$(BIN)/python -m pip install --quiet .
	$(BIN)/flashcore-cupy run $(RUN_ARGS)

test: $(BIN)/python
	rm -rf build
	$(BIN)/python -m pip install --quiet '.[test]'
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(BIN)/python
	$(BIN)/python -m pip install --quiet '.[lint]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(KERNELS)

docs: $(BIN)/python
	rm -rf build
	$(BIN)/python -m pip install --quiet '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

format: $(BIN)/python
	$(BIN)/python -m pip install --quiet '.[lint]'
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(KERNELS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is missing or older than 3.10: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
