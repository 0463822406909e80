# `make demo` and `make test` make their own environment first, from pinned versions.

VENV ?= .venv
# If none is given, the one that made the environment, as long as it is there.
PYTHON ?= $(or $(realpath $(VENV)/bin/python),python3.11)
PYTHON := $(PYTHON)
RUNS ?= runs
SEED ?= 0
BIN = $(VENV)/bin
# Pythons for which there are pinned versions, and the one that was asked for.
SUPPORTED = $(patsubst .ci/constraints-%.txt,%,$(sort $(wildcard .ci/constraints-*.txt)))
TELL_VERSION = import sys; print("%d.%d" % sys.version_info[:2])
VERSION := $(or $(shell $(PYTHON) -c '$(TELL_VERSION)' 2> /dev/null),unknown)
CONSTRAINTS = .ci/constraints-$(VERSION).txt
DEMO = $(RUNS)/demo
# Two runs side by side, one thread each, train 1.5 times as fast as two that share two threads.
TRAIN = NPROC=1 $(BIN)/python -m launch.train
# Seeds and reruns share compiled programs; huge pages spare XLA most of its page faults, which
# on CPU nearly doubles the speed of training.
export JAX_COMPILATION_CACHE_DIR ?= $(abspath $(RUNS))/.jax_cache
HEAP = glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:$(HEAP)

.PHONY: demo test test-slow test-tpu check format results results-gradients \
  results-long-horizon benchmark \
  benchmark-tpu pods peers environment clean

demo: $(VENV)/.installed  ## Train depo_small without sleep (N = 1) and with it (N = 4), and compare.
	@$(MAKE) --no-print-directory -j2 $(DEMO)/n1 $(DEMO)/n4
	@$(BIN)/python -m launch.evaluate --workdir=$(DEMO)/n1 --workdir=$(DEMO)/n4
	@$(BIN)/python -m launch.report --workdir=$(DEMO)/n1 --workdir=$(DEMO)/n4 --out=$(DEMO)/report

.PHONY: $(DEMO)/n1 $(DEMO)/n4
$(DEMO)/n1 $(DEMO)/n4: $(DEMO)/n%: $(VENV)/.installed
	@$(TRAIN) --config=experiments/depo_small.py --workdir=$@ \
	  --config.model.passes=$* --config.training.seed=$(SEED)

# Three seeds of every N, side by side on two cores; the figures in README come from here.
SEEDS = 0 1 2
RESULTS = $(RUNS)/results
DEPO_RUNS = $(foreach n,4 2 1,$(foreach s,$(SEEDS),$(RESULTS)/depo_small/n$n/seed$s))
RULE110_RUNS = $(foreach n,4 1,$(foreach s,$(SEEDS),$(RESULTS)/rule110_small/n$n/seed$s))

results: $(VENV)/.installed  ## Retrain, evaluate and report all committed results (about an hour).
	@$(MAKE) --no-print-directory -j2 $(DEPO_RUNS) $(RULE110_RUNS)
	@$(BIN)/python -m launch.evaluate $(DEPO_RUNS:%=--workdir=%)
	@$(BIN)/python -m launch.evaluate $(RULE110_RUNS:%=--workdir=%)
	@$(BIN)/python -m launch.report $(DEPO_RUNS:%=--workdir=%) --out=experiments/results/depo_small
	@$(BIN)/python -m launch.report $(RULE110_RUNS:%=--workdir=%) \
	  --out=experiments/results/rule110_small

.PHONY: $(DEPO_RUNS) $(RULE110_RUNS)
$(DEPO_RUNS) $(RULE110_RUNS): $(RESULTS)/%: $(VENV)/.installed
	@$(TRAIN) --config=experiments/$(word 1,$(subst /, ,$*)).py --workdir=$@ \
	  --config.model.passes=$(patsubst n%,%,$(word 2,$(subst /, ,$*))) \
	  --config.training.seed=$(patsubst seed%,%,$(word 3,$(subst /, ,$*)))

# The same model with gradients through the last k of its four passes; k = 4 is all of them.
GRADIENTS = experiments/results/gradients
GRADIENT_RUNS = $(foreach s,$(SEEDS),$(foreach k,1 2 4,$(RESULTS)/gradients/k$k/seed$s))

results-gradients: $(VENV)/.installed  ## What cheaper gradients cost and teach (half an hour).
	NPROC=1 $(BIN)/python -m launch.benchmark --suite=gradients --out=$(GRADIENTS)
	@$(MAKE) --no-print-directory -j2 $(GRADIENT_RUNS)
	@$(BIN)/python -m launch.evaluate --nolatency $(GRADIENT_RUNS:%=--workdir=%)
	@$(BIN)/python -m launch.report $(GRADIENT_RUNS:%=--workdir=%) --out=$(GRADIENTS)

.PHONY: $(GRADIENT_RUNS)
$(GRADIENT_RUNS): $(RESULTS)/gradients/%: $(VENV)/.installed
	@$(TRAIN) --config=experiments/depo_small.py --workdir=$@ \
	  --config.model.gradient_passes=$(patsubst k%,%,$(word 1,$(subst /, ,$*))) \
	  --config.training.seed=$(patsubst seed%,%,$(word 2,$(subst /, ,$*)))

# Four models that read the same facts, asked for them up to 4,096 pages later.
HORIZON = experiments/results/long_horizon
HORIZON_RUNS = $(foreach s,$(SEEDS),$(foreach m,sleeping full_longer plain sliding full,\
  $(RESULTS)/long_horizon/$m/seed$s))

results-long-horizon: $(VENV)/.installed  ## Who remembers how long (forty minutes).
	@$(MAKE) --no-print-directory -j2 $(HORIZON_RUNS)
	@$(BIN)/python -m launch.long_horizon $(HORIZON_RUNS:%=--workdir=%) --out=$(HORIZON) \
	  --costs=experiments/results/benchmarks/horizon.json

.PHONY: $(HORIZON_RUNS)
$(HORIZON_RUNS): $(RESULTS)/long_horizon/%: $(VENV)/.installed
	@$(TRAIN) --config=experiments/long_horizon.py:$(word 1,$(subst /, ,$*)) --workdir=$@ \
	  --config.training.seed=$(patsubst seed%,%,$(word 2,$(subst /, ,$*)))

# The figures of experiments/results/BENCHMARKS.md.
BENCHMARK = $(BIN)/python -m launch.benchmark --out=experiments/results --environments=$(PEERS)
benchmark: $(VENV)/.installed peers  ## Speed of every part, beside its peers (an hour).
	NPROC=1 $(BENCHMARK) --suite=rule --peer=transformers --peer=ejkernel --peer=scan --repeats=5
	NPROC=1 $(BENCHMARK) --suite=wake
	NPROC=1 $(BENCHMARK) --suite=sleep
	NPROC=1 $(BENCHMARK) --suite=horizon --repeats=100
	NPROC=1 $(BENCHMARK) --suite=train
	NPROC=1 $(BENCHMARK) --suite=loop --repeats=4
	NPROC=1 $(BENCHMARK) --suite=engine --repeats=4
	XLA_FLAGS=--xla_force_host_platform_device_count=8 $(BENCHMARK) --suite=devices

# The TPU compiler stays out of the environment of everything else.
TPU ?= .venv-tpu
benchmark-tpu: $(TPU)/.installed  ## What compiles for TPUs, on a machine without one (ten minutes).
	JAX_PLATFORMS=cpu $(TPU)/bin/python -m launch.benchmark --out=experiments/results --suite=tpu
pods: $(TPU)/.installed  ## What the pod experiments would need, compiled for TPUs (an hour).
	JAX_PLATFORMS=cpu $(TPU)/bin/python -m launch.pods --out=experiments/results
test-tpu: $(TPU)/.installed  ## Tests that need the TPU compiler, and no TPU.
	$(TPU)/bin/python -m pip install --quiet --editable '.[tpu,test]' --constraint $(CONSTRAINTS)
	$(TPU)/bin/python -m pytest -q -m tpu tests/launch/test_compile_tpu.py
$(TPU)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(TPU)
	$(TPU)/bin/python -m pip install --quiet --upgrade pip
	$(TPU)/bin/python -m pip install --quiet --editable '.[tpu]' --constraint $(CONSTRAINTS)
	@touch $@

# Other implementations, for comparison; their versions are those in launch/benchmark/peers/*.txt.
PEERS ?= .venv-peers
peers: $(PEERS)/transformers/.installed $(PEERS)/ejkernel/.installed
$(PEERS)/%/.installed: launch/benchmark/peers/%.txt | $(CONSTRAINTS)
	$(PYTHON) -m venv $(PEERS)/$*
	$(PEERS)/$*/bin/python -m pip install --quiet --upgrade pip
	$(PEERS)/$*/bin/python -m pip install --quiet --requirement $<
	@touch $@

# First without XLA's optimizations, which compiles 3x faster; then the tests that depend on them.
test: $(VENV)/.installed  ## All default tests, on 8 virtual CPU devices.
	$(BIN)/python -m pytest -q -n auto --dist=loadfile
	$(BIN)/python -m pytest -q -n auto --dist=loadfile -m 'optimized and not slow' --optimize

test-slow: $(VENV)/.installed  ## The heavier ones.
	$(BIN)/python -m pytest -q -n auto --dist=loadfile -m slow --optimize

check: $(VENV)/.installed  ## Lint, format, types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

environment: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test,dev]'
	@touch $@

# Reports a Python without pinned versions: make runs this rule only if the file is missing.
.ci/constraints-%.txt:
	$(error PYTHON=$(PYTHON) $(if $(filter unknown,$*),cannot be run,is Python $*); \
	  supported are $(SUPPORTED): give one of them, as in make PYTHON=python$(lastword $(SUPPORTED)))

clean:
	rm -rf $(RUNS)/demo $(VENV)
