# `make search` and `make test` each work alone and first in a fresh clone: both set up .venv when it is missing or stale.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup search test test-all sanitize mutations coverage lint wheel bench clean
setup: $(VENV)/installed

# torch goes in first, so that the C++ kernels are built against it and it is not downloaded a second time for the build.
$(VENV)/installed: pyproject.toml setup.py $(wildcard dssp_kernels/*/cpu.cpp dssp_kernels/*.h dssp_kernels/*/*.h)
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
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

test-all: setup
	$(RUN) -m pytest -m "slow or not slow" $(ARGS)

# The C++ kernels' tests on kernels compiled with AddressSanitizer and UndefinedBehaviorSanitizer, in build/sanitize.
sanitize: setup
	$(RUN) -m tests.sanitize $(ARGS)

# Breaks formulas one by one and sees that a test fails; writes docs/mutations.md.
mutations: setup
	$(RUN) -m tests.mutations $(ARGS)

coverage: setup
	$(RUN) -m coverage erase
	for group in kernels search bench integration; do $(RUN) -m coverage run -m pytest tests/$$group || exit 1; done
	$(RUN) -m coverage combine
	$(RUN) -m coverage report $(ARGS)

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
