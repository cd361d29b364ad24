# Two commands: `make demo` and `make test`. Each makes the environment first where it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint docs bench clean

demo: $(INSTALLED)
	$(BIN)/curlora demo

test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into site/. A link that leads nowhere ends it.
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

# About 50 minutes on two cores that do nothing else. Tables and a plot go into docs/benchmarks.md.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/speed/step.py
	$(BIN)/python benchmarks/speed/attach.py
	$(BIN)/python benchmarks/speed/growth.py
	$(BIN)/python benchmarks/speed/storage.py
	$(BIN)/python benchmarks/speed/page.py

# torch by itself and first: whatever comes after finds it there and does not pick another build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
