# Two commands: `make demo` and `make test`. Each makes the environment first where it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint docs notebooks pages bench compat dist clean

demo: $(INSTALLED)
	$(BIN)/curlora demo

test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zizmor --quiet --offline .github

# The site, into site/. A link that leads nowhere ends it.
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

# Runs the notebooks and keeps what they put out.
notebooks: $(INSTALLED)
	$(BIN)/python tools/notebooks.py

# The tables and figures of the documentation, from the raw results in benchmarks/.
pages: $(INSTALLED)
	$(BIN)/python benchmarks/pages.py

# About 50 minutes on two cores that do nothing else. Tables and a plot go into docs/benchmarks.md.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/speed/step.py
	$(BIN)/python benchmarks/speed/attach.py
	$(BIN)/python benchmarks/speed/growth.py
	$(BIN)/python benchmarks/speed/storage.py
	$(BIN)/python benchmarks/pages.py

# The tests that meet other libraries, with their lowest, pinned and newest versions, on every Python that is found;
# docs/compatibility.md. COMPAT holds options, such as --torch-backend cpu.
compat: $(INSTALLED)
	$(BIN)/python tools/compat.py $(COMPAT)

# What goes to PyPI, into dist/.
dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# torch by itself and first: whatever comes after finds it there and does not pick another build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
