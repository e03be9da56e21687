# One command each; every target makes .venv when it is missing and re-uses it while it is current.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm

.PHONY: setup setup-vllm setup-browser demo test test-vllm check bench paper docs lock clean

setup: $(VENV)/.current

$(VENV)/.current: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" sh docs/demo.sh

# Three files of tests at a time, in their order: some compute, others wait for what runs in real time.
test: setup
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The whole job against real vLLM on the CPU, a tiny model and a fake GPU driver: 1.8 GB to install, then minutes.
test-vllm: setup $(VLLM)/.current
	WATTRACE_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest tests/vllm

setup-vllm: $(VLLM)/.current

$(VLLM)/.current: tests/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	$(VLLM)/bin/python tests/vllm/name_vllm.py
	@touch $@

# A Chromium for tests/browser, which skip themselves without one.
setup-browser:
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-liberation; }

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/make_reference.py --check

docs: setup
	$(BIN)/python docs/make_reference.py

bench: setup
	$(BIN)/python benchmarks/run.py

# Simulates hundreds of cells in virtual time, then writes docs/paper.md: minutes; goes on where it was cut off.
paper: setup
	$(BIN)/python benchmarks/paper.py

# A fresh environment's newest versions that pyproject.toml allows, written down exactly.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	{ echo "# Exact versions of everything that 'make setup' installs: what was tested. Renew with 'make lock'."; \
	  .venv-lock/bin/python -m pip freeze --exclude-editable | sed "s/^\(uvloop==.*\)/\1; sys_platform != 'win32'/"; \
	} > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) $(VLLM) demo runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
