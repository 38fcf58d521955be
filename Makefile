# Two commands do everything on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train test lint docs release help
.DEFAULT_GOAL := help

help:
	@echo "make train   set up $(VENV) and distil the embedded teacher of garments (minutes on a CPU)"
	@echo "make test    set up $(VENV) and run all tests; ARGS='-m \"not slow\"' runs the quick ones"
	@echo "make lint    check style, types and layers"
	@echo "make docs    build the documentation into build/docs; a broken link fails"
	@echo "make release build the sdist and, from it, the wheel into dist/"

# What is installed, for a user and for a developer.
$(VENV)/.ready: WHAT = .
$(VENV)/.ready-dev: WHAT = .[dev]
$(VENV)/.ready $(VENV)/.ready-dev: pyproject.toml constraints.txt CMakeLists.txt
	@echo "== setting up $(VENV): downloads PyTorch and more, which takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.3"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--build-constraint constraints.txt --editable "$(WHAT)"
	@touch $@

train: $(VENV)/.ready
	@echo "== distilling the teacher of garments into a one-step generator"
	$(BIN)/python -m sid_fast.train --preset fashion $(ARGS)

test: $(VENV)/.ready-dev
	@echo "== all tests; those that need a GPU are skipped without one"
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@echo "== types and layers, on an installed tree"
	rm -rf build/lint
	$(BIN)/python -m pip install --quiet --no-deps --build-constraint constraints.txt \
		--target build/lint .
	MYPYPATH=build/lint $(BIN)/mypy  # before the checkout, which lacks sid_fast.kernels
	packages=$$(cd $(VENV)/lib/python3.*/site-packages && pwd) && cd build/lint && \
		PYTHONPATH=.:$$packages $(abspath $(BIN))/python -S -c \
		"from importlinter.cli import lint_imports_command as lint; lint()" \
		$(CURDIR)/pyproject.toml --no-cache

docs: $(VENV)/.ready-dev
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env docs build/docs
	@echo "== open build/docs/index.html"

# The wheel is built from the sdist, so an sdist that lacks a file fails here.
release: $(VENV)/.ready-dev
	test -z "$$(git status --porcelain)" || { echo "commit first: an sdist takes the tree"; exit 2; }
	rm -rf dist build/release
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --target build/release \
		scikit-build-core
	PYTHONPATH=build/release $(BIN)/python -c \
		"from scikit_build_core.build import build_sdist; build_sdist('dist')"
	$(BIN)/python -m pip wheel --quiet --no-deps --build-constraint constraints.txt \
		--wheel-dir dist dist/*.tar.gz
	$(BIN)/python -m pip install --quiet --no-deps --target build/release/site dist/*.whl
	cd build && PYTHONPATH=release/site:$$(echo $(abspath $(VENV))/lib/python3.*/site-packages) \
		$(abspath $(BIN))/python -S -c "import sid_fast; print(sid_fast.__file__)"
