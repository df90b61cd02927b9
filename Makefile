# make demo    the whole library in minutes on a CPU: distil, measure, report (runs/demo)
# make serve   the live page of the built-in student that streams, beside its teacher
# make test    all tests but the slow ones; make test-slow: those
# make gpu     everything that waits for a GPU, in one resumable command (bench/gpu.py)
# make wheel   build the wheel, install it elsewhere, run a recipe from there
# make lint    ruff, types, layers, budgets
# make format  ruff's formatter
# Every target makes .venv first if it is missing. PYTHON=python3.12 chooses the interpreter, WORKERS=8 the test processes,
# TORCH_INDEX=... takes torch from an index that has the CPU build, where pip would take the much larger CUDA build; it
# counts when .venv is made, and is refused afterwards if it is another one.

PYTHON ?= python3
WORKERS ?= auto
VENV := .venv
TORCH := torch>=2.11,<2.14
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export OMP_NUM_THREADS ?= 1

ifneq ($(and $(TORCH_INDEX),$(wildcard $(VENV)/.torch)),)
ifneq ($(TORCH_INDEX),$(shell cat $(VENV)/.index 2>/dev/null))
ifneq ($(MAKECMDGOALS),clean)
$(error $(VENV) already has a torch, which is not from TORCH_INDEX=$(TORCH_INDEX); run "make clean" first)
endif
endif
endif

.PHONY: demo serve test test-slow gpu wheel lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.core
	OMP_NUM_THREADS=$$($(BIN)/python -c 'from fewstep.core.env import cpu_count; print(cpu_count())') $(BIN)/fewstep demo --output runs/demo

serve: $(VENV)/.serve
	$(BIN)/fewstep serve world/stream world --open

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow"

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -q -n $(WORKERS) -m slow --timeout 3600

gpu: $(VENV)/.test
	PYTHONPATH=src $(BIN)/python bench/gpu.py

wheel: $(VENV)/.core
	$(BIN)/python tools/try_wheel.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/budgets.py
	$(BIN)/lint-imports
	$(BIN)/python tools/circles.py
	$(BIN)/mypy
	$(BIN)/python tools/notebooks.py --types

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.made
	$(INSTALL) "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	echo "$(TORCH_INDEX)" > $(VENV)/.index
	$(BIN)/python -W ignore -c 'import torch; print(torch.__version__)' > $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e .
	touch $@

$(VENV)/.serve: $(VENV)/.core pyproject.toml
	$(INSTALL) -e ".[serve]"
	touch $@

$(VENV)/.test: $(VENV)/.core pyproject.toml
	$(INSTALL) -e ".[test]"
	touch $@

$(VENV)/.lint: $(VENV)/.core pyproject.toml
	$(INSTALL) -e ".[lint]"
	touch $@
