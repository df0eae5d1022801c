# The whole process: `make demo` and `make test` need nothing but Python 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch is only for tests of what needs it, and for GPUs. Where this exact build cannot be had, the
# newest one is taken.
TORCH ?= torch==2.13.0
FUZZ_SECONDS ?= 120

.PHONY: install check lint test fuzz docs bench demo clean

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet $(TORCH) || $(BIN)/python -m pip install --quiet torch
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

$(VENV)/.images: $(VENV)/.base
	$(BIN)/python -m pip install --quiet $(TORCH) || $(BIN)/python -m pip install --quiet torch
	$(BIN)/python -m pip install --quiet -e '.[images]'
	touch $@

install: $(VENV)/.dev  ## everything needed to work on plymix, in .venv

check: lint test  ## what CI runs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(VENV)/.dev  ## all tests (no network needed)
	$(BIN)/python -m pytest -n 2

fuzz: $(VENV)/.dev  ## damaged and hostile input for every parser, for FUZZ_SECONDS
	$(BIN)/python tests/fuzz.py --seconds $(FUZZ_SECONDS)

docs: $(VENV)/.base  ## write the generated pages of docs/
	$(BIN)/python scripts/write_docs.py

bench: $(VENV)/.dev  ## measure, and write the table in docs/benchmarks.md
	$(BIN)/python benchmarks/run.py

demo: $(VENV)/.images  ## install, merge the pair of demo/pair block by block, draw the results
	$(BIN)/python scripts/demo.py

clean:
	rm -rf $(VENV) demo/out .mypy_cache .ruff_cache .pytest_cache .hypothesis
