# Two commands do everything from a fresh clone: `make demo` and `make test`. `make help` lists the rest.

VENV := .venv
PY := $(VENV)/bin/python
# auto looks for an NVIDIA driver; none, 12 or 13 decide by hand.
CUDA ?= auto
# Each test process takes about 1 GB with torch in it.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$n)
STAMP := $(VENV)/.setup-$(CUDA)
PYTEST_ARGS ?=
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test format wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  variables: PYTHON=/path/to/python3  CUDA=auto|none|12|13  JOBS=N  PYTEST_ARGS=...  DEMO_ARGS=..."

setup: $(STAMP) ## build .venv with the versions of constraints.txt (demo and test do this by themselves)
	@echo "$(VENV) is ready"

$(STAMP): pyproject.toml constraints.txt tools/setup.sh
	@CUDA=$(CUDA) PYTHON="$(PYTHON)" bash tools/setup.sh $(VENV)
	@touch $@

demo: $(STAMP) ## the main job on an embedded real head: data, training, inference, figures (results in demo/)
	@$(PY) -m fastsrgan demo -o demo --overwrite $(DEMO_ARGS)

test: $(STAMP) ## formatting, lint, types and tests
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@$(PY) -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

format: $(STAMP) ## rewrite the sources as `make test` wants them
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

wheel: $(STAMP) ## build the wheel and the source archive into dist/
	@$(PY) -m build --no-isolation

clean: ## remove .venv, caches, build products and demo/
	@rm -rf $(VENV) demo build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
