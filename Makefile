# Everything happens in .venv, made with PYTHON. On Linux the package index's torch brings CUDA along (3 GB);
# `make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu` takes the CPU build from there.
PYTHON ?= python3
TORCH_INDEX ?=
PYTEST ?=
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test gpu-check lint format bench bench-scale wheel clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 13

setup: $(READY) ## Make .venv with everything pinned

$(READY): requirements/cpu.txt requirements/no-deps.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "bismooth needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Set another one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements/cpu.txt)"
	$(BIN)/pip install --quiet -r requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/no-deps.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY) ## Compile SmolLM2-135M into verified INT8 engines
	$(BIN)/python -m bismooth.tools.demo

test: lint ## Lint, check types, run the tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup $(PYTEST)

gpu-check: $(READY) ## On a GPU host: build and run real engines, and show their latency
	$(BIN)/pip install --quiet 'cuda-python>=12.6'
	$(BIN)/python -m pytest -m gpu --require-gpu -v -s

lint: $(READY) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY) ## Let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Measure the numbers in README.md, docs/bundle.md and docs/llama3-70b.md
	$(BIN)/python -m bismooth.tools.bench
	$(BIN)/python -m bismooth build build/bench/w8a8 --engine onnxruntime --force
	$(BIN)/python -m bismooth package build/bench/w8a8 -o build/bench/bundle --force
	$(BIN)/python -m bismooth.tools.bench_bundle build/bench/bundle
	$(BIN)/python -m bismooth.tools.bench_walls --kinds scale --factors 100 300 --output build/walls-scale
	$(BIN)/python -m bismooth.tools.bench_walls --kinds rotate --factors 30 100 --output build/walls-rotate

bench-scale: $(READY) ## Measure docs/scale.md: models of up to 18 GB, 30 GB of disk
	$(BIN)/python -m bismooth.tools.bench_scale

wheel: $(READY) ## Build the wheel into dist/
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m build --wheel --no-isolation

clean: ## Remove everything that make made
	rm -rf .venv build dist bismooth.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
