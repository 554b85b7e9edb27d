# Every target sets up what it needs in .venv; only Python 3.11+ and make have to be there.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin

# The core tests carry none of these marks (see pyproject.toml).
LONG := slow or kill or ray or train or browser or peers or data

.PHONY: demo test test-all lint docs bench clean

demo: .venv/ready
	$(BIN)/weakspot explain --samples --out demo

# One process for each core; `make test PYTEST="tests/attacks -x"` runs a part.
test: .venv/ready-dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not ($(LONG))" $(PYTEST)

test-all: .venv/ready-dev
	$(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST)

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean
	@echo "open site/index.html"

bench: .venv/ready-dev
	$(BIN)/python -m benchmarks.explain

clean:
	rm -rf .venv demo site

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "weakspot needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "venv is missing; on Debian: apt-get install python3-venv"; exit 1; }

.venv/ready: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/ready-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ .venv/ready

.venv/ready-docs: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@ .venv/ready
