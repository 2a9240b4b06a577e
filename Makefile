# `make` alone lists the targets. Every path is relative: the folder's own path may contain spaces.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint bench clean

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
# Python 3.11 comes first because requirements.txt was made with it. `make setup PYTHON=...` picks another.
PYTHON :=
PYTHONS := $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3 python)
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' Makefile

setup: .venv/.installed ## Create .venv with the tested packages (redone only when their list changes)

demo: setup ## Run the whole miniature, print the table, write runs/demo/
	@.venv/bin/fedsafe table --config configs/table/demo.yaml --output runs/demo

test: setup ## Run the test suite; `make test ARGS="-m 'not slow'"` passes options to pytest
	@$(PIP) check
	@OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile \
		--no-loadscope-reorder $(ARGS)

lint: setup ## Check style, formatting and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

bench: setup ## Run every benchmark, side by side with what a user would pick instead
	@for benchmark in $$(grep -l __main__ benchmarks/*.py); do \
		echo "== $$benchmark"; $(PY) "$$benchmark" || exit 1; done

clean: ## Remove .venv, caches and build outputs (runs/ stays)
	@rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find src tests benchmarks configs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# .installing marks an installation under way and becomes the stamp by a rename, last: what an interrupt left half-done
# is thrown away and made anew, and a list edited meanwhile is newer than the stamp. torch is installed first and alone:
# the exact pin can give a local CPU build, where a range asked together with the rest might pull a CUDA build.
.venv/.installed: setup.cfg requirements.txt Makefile
	@set -e; \
	clear=; \
	if [ -e .venv/.installing ] || ! $(PY) $(NEW_ENOUGH); then clear=--clear; fi; \
	python=; \
	for candidate in $(PYTHONS); do \
		if "$$candidate" $(NEW_ENOUGH); then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "fedsafe needs Python 3.11 or newer, and none of these is: $(subst ",,$(PYTHONS))." >&2; \
		echo "Install one, or name it: make setup PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
		version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "$$python lacks the venv module. Install it (Debian, Ubuntu: apt-get install python$$version-venv)," >&2; \
		echo "then run make again." >&2; exit 1; \
	fi; \
	rm -f .venv/.installed; \
	echo "setup 1/4: .venv with $$("$$python" --version)"; \
	"$$python" -m venv $$clear .venv; \
	touch .venv/.installing; \
	echo "setup 2/4: PyTorch (the largest download)"; \
	$(PIP) install -qq torch==2.13.0; \
	echo "setup 3/4: the packages of requirements.txt (a minute or two)"; \
	$(PIP) install -qq -r requirements.txt; \
	echo "setup 4/4: fedsafe itself, editable"; \
	$(PIP) install -qq --no-deps --no-build-isolation -e .; \
	mv .venv/.installing .venv/.installed
