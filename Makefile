# make book    build the book; it says where to open it      make serve    the same, served on loopback
# make test    every check: linters, unit tests, notebooks, pages
# make execute re-run the notebooks that are stale           make lint     linters and notebook rules alone
# make bench   how fast, frugal and exact bnlib.scratch is, beside others; wants a quiet machine
# make clean   remove what these commands made
# A target that is up to date does nothing; `make -B test` does it all the same.
# Variables: PYTHON=python3.12, TORCH_INDEX=<index of PyTorch's CPU builds> (README), PORT=8000.

PYTHON ?= python3
PORT ?= 8000
TORCH_INDEX ?=
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 2

export OMP_NUM_THREADS = 1
export PYTHONHASHSEED = 0
export JUPYTER_PREFER_ENV_PATH = 1
export PYDEVD_DISABLE_FILE_VALIDATION = 1

FILES = $(shell find $(1) -type f ! -path '*/__pycache__/*' ! -path '*/.ipynb_checkpoints/*' 2>/dev/null)
LIBRARY := $(call FILES,bnlib) pyproject.toml
NOTEBOOKS := $(wildcard chapters/*.ipynb)
PAGES := $(NOTEBOOKS) $(call FILES,back _static _templates) intro.md references.bib _config.yml _toc.yml
TOOLS := $(call FILES,tools)
TESTS := $(call FILES,tests)
HOSTING := $(call FILES,.github) .ci/run

.PHONY: book serve test execute lint unit notebooks pages bench clean repository pins
.DELETE_ON_ERROR:

book: _build/.book
	@echo "The book: file://$(CURDIR)/_build/html/index.html   (or: make serve)"

serve: book
	@echo "Reading at http://127.0.0.1:$(PORT)   (stop with Ctrl-C)"
	@$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

test: lint unit notebooks pages
	@echo "All checks passed.   (again, though nothing changed: make -B test)"

execute: $(INSTALLED)
	@$(BIN)/python tools/execute.py

bench: $(INSTALLED)
	@$(BIN)/python benchmarks/scratch.py

lint: _build/.lint
unit: _build/.unit
notebooks: _build/.notebooks
pages: _build/.pages

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "This needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Install one and name it: make PYTHON=python3.12 ..."; exit 1; }
	@test -d .venv || { $(PYTHON) -m venv .venv >/tmp/venv.$$$$ 2>&1 && touch .venv/.made-by-make; } || { \
	  rm -rf .venv; echo "$(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing the packages of requirements.txt into .venv: a few minutes, once"
	@if test -n "$(TORCH_INDEX)"; then $(PIP) --no-deps --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' requirements.txt)" 2>.venv/pip.log; fi || { tools/explain_pip.sh; exit 1; }
	@$(PIP) -r requirements.txt 2>.venv/pip.log || { tools/explain_pip.sh; exit 1; }
	@$(PIP) --no-deps --no-build-isolation --editable . 2>.venv/pip.log || { tools/explain_pip.sh; exit 1; }
	@touch $@

_build/.book: $(INSTALLED) $(LIBRARY) $(PAGES) tools/execute.py
	@$(BIN)/python tools/execute.py
	@$(BIN)/jupyter-book build . -n -W --keep-going -q
	@test -f _build/html/index.html || { echo "The build ended without _build/html/index.html"; exit 1; }
	@touch $@

_build/.lint: $(INSTALLED) $(LIBRARY) $(PAGES) $(TOOLS) $(TESTS) $(HOSTING)
	@mkdir -p _build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows
	$(BIN)/python tools/execute.py --check
	$(BIN)/python tools/check_notebooks.py
	$(BIN)/python tools/lecture.py --check
	@touch $@

_build/.unit: $(INSTALLED) $(LIBRARY) $(TOOLS) $(TESTS) _config.yml $(NOTEBOOKS)
	@mkdir -p _build
	$(BIN)/python -m pytest tests -n 2 --ignore tests/pages
	@touch $@

_build/.notebooks: $(INSTALLED) $(LIBRARY) $(NOTEBOOKS)
	@mkdir -p _build
	$(BIN)/python -m pytest chapters --nbval -n 2 --dist loadscope
	@touch $@

_build/.pages: _build/.book $(TESTS)
	$(BIN)/python -m pytest tests/pages -n 2
	@touch $@

# Write the repository's address where it stands: make repository URL=https://github.com/you/batchnorm-book
repository: $(INSTALLED)
	@$(BIN)/python tools/repository.py "$(URL)"

# Pin the newest versions that requirements.in allows; on Linux, since Triton exists there alone
# (and uvloop everywhere but on Windows).
# What the CUDA build of PyTorch brings for itself is left out.
pins:
	@rm -rf _build/pins && $(PYTHON) -m venv _build/pins && _build/pins/bin/pip install --quiet -r requirements.in
	@{ echo "# Made by 'make pins' from requirements.in: the build of the book is reproducible."; \
	  _build/pins/bin/pip freeze | sed 's/+cpu$$//; s/^triton==.*/& ; sys_platform == "linux"/; s/^uvloop==.*/& ; sys_platform != "win32"/' \
	    | grep -v -E '^(nvidia|cuda)'; } > requirements.new && mv requirements.new requirements.txt

clean:
	@rm -rf _build .pytest_cache .ruff_cache chapters/.ruff_cache .mypy_cache .hypothesis
	@find bnlib tests tools chapters -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
	@if test -e .venv/.made-by-make; then rm -rf .venv; elif test -d .venv; then echo "left alone: .venv, which make did not create"; fi
