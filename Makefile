# `make demo` and `make test` make their own environment first, from pinned versions.

PYTHON ?= python3.11
VENV ?= .venv
RUNS ?= runs
SEED ?= 0
BIN = $(VENV)/bin
CONSTRAINTS = .ci/constraints-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
DEMO = $(RUNS)/demo
TRAIN = $(BIN)/python -m launch.train
# Seeds and reruns share compiled programs.
export JAX_COMPILATION_CACHE_DIR ?= $(abspath $(RUNS))/.jax_cache

.PHONY: demo test test-slow check format results environment clean

demo: $(VENV)/.installed  ## Train depo_small without sleep (N = 1) and with it (N = 4), and compare.
	@$(MAKE) --no-print-directory -j2 $(DEMO)/n1 $(DEMO)/n4
	@$(BIN)/python -m launch.evaluate --workdir=$(DEMO)/n1 --workdir=$(DEMO)/n4
	@$(BIN)/python -m launch.report --workdir=$(DEMO)/n1 --workdir=$(DEMO)/n4 --out=$(DEMO)/report

.PHONY: $(DEMO)/n1 $(DEMO)/n4
$(DEMO)/n1 $(DEMO)/n4: $(DEMO)/n%: $(VENV)/.installed
	@$(TRAIN) --config=experiments/depo_small.py --workdir=$@ \
	  --config.model.passes=$* --config.training.seed=$(SEED)

test: $(VENV)/.installed  ## All default tests, on 8 virtual CPU devices.
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.installed  ## The heavier ones.
	$(BIN)/python -m pytest -q -m slow

check: $(VENV)/.installed  ## Lint, format, types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

environment: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test,dev]'
	@touch $@

clean:
	rm -rf $(RUNS)/demo $(VENV)
