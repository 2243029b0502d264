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
# Of fuzz and soak, which write their figures to FUZZ_JSON and SOAK_JSON where these are set.
MINUTES ?= 20
FUZZ_JSON ?=
SOAK_JSON ?=
# Of mutants: the file that keeps what they came to; build/mutants.json where it is not set.
MUTANTS_JSON ?=
# Of test-matrix: words in the names of the rows to run, and the file that keeps what they came to.
ROWS ?=
MATRIX_JSON ?=
# plain, atheris (pip install atheris; guided by the code that inputs reach), or auto: atheris where it is there.
ENGINE ?= auto

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-extras test-matrix mutants fuzz soak format docs wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  variables: PYTHON=/path/to/python3  CUDA=auto|none|12|13  JOBS=N  MINUTES=N  ROWS=...  PYTEST_ARGS=...  DEMO_ARGS=..."

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

test-extras: $(STAMP) ## what the tests of pages and of BIDS datasets need beside Python: Chromium, the BIDS validator
	@bash tools/test_extras.sh $(VENV)

test-matrix: $(STAMP) ## the tests of arithmetic, signals, ranks and files in many surroundings; ROWS=... picks some
	@$(PY) tools/test_matrix.py $(if $(ROWS),--rows $(ROWS)) $(if $(MATRIX_JSON),--json $(MATRIX_JSON))

mutants: $(STAMP) ## small faults in a copy, one at a time, for MINUTES: which do the tests notice? Goes on where it ended
	@$(PY) tools/mutants.py --minutes $(MINUTES) $(if $(MUTANTS_JSON),--json $(MUTANTS_JSON))

fuzz: $(STAMP) ## damaged files through every reader for MINUTES; findings go to build/fuzz
	@$(PY) tools/fuzz.py --minutes $(MINUTES) --engine $(ENGINE) $(if $(FUZZ_JSON),--json $(FUZZ_JSON))

soak: $(STAMP) ## convert, train and infer under random kill -9 for MINUTES; nothing may be lost or grow
	@$(PY) tools/soak.py --minutes $(MINUTES) $(if $(SOAK_JSON),--json $(SOAK_JSON))

format: $(STAMP) ## rewrite the sources as `make test` wants them
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

docs: $(STAMP) ## build the documentation as a site into site/ (its search needs a server: python -m http.server -d site)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -q -f tools/mkdocs.yml

wheel: $(STAMP) ## build the wheel and the source archive into dist/
	@$(PY) -m build --no-isolation

clean: ## remove .venv, caches, build products and demo/
	@rm -rf $(VENV) demo build dist site .pytest_cache .hypothesis .ruff_cache .mypy_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
