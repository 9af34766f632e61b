# `make search` and `make test` each work alone and first in a fresh clone: both set up .venv when it is missing or stale.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup search test test-all lint wheel bench clean
setup: $(VENV)/installed

# torch goes in first, so that the C++ kernels are built against it and it is not downloaded a second time for the build.
$(VENV)/installed: pyproject.toml setup.py $(wildcard dssp_kernels/*/cpu.cpp)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip "setuptools>=77"
	$(RUN) -m pip install --quiet "torch>=2.10"
	$(RUN) -m pip install --quiet --editable ".[dev]"
	touch $@

search: setup
	$(RUN) -m dssp.search $(ARGS)

test: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest $(ARGS)

test-all: setup
	$(RUN) -m pytest -m "slow or not slow" $(ARGS)

lint: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(RUN) -m mypy

# One wheel for every torch >= 2.10 and every Python >= 3.10 (LibTorch stable ABI, Python limited ABI).
wheel: setup
	$(RUN) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

bench: setup
	$(RUN) bench/edge_throughput.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info dssp_kernels/*.so
