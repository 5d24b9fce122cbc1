# make quickstart   the whole line on the embedded model, from a fresh clone
# make test         every test, from a fresh clone
# make test-fast    those that take seconds
# make test-stacks  a quick part of them on the newest JAX and on Colab's
# make lint

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; \
  do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo $$p && break; done)
QUICKSTART ?= quickstart
# What language models are checked against; `make test TORCH=` leaves that out.
TORCH ?= torch==2.13.0
CONFIG = experiments/quickstart.py
# Processes that share the tests; a file stays in one.
JOBS ?= 2
PYTEST = .venv/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Without these, glibc gives the memory of every large temporary back to the
# system, and a step on CPU spends a fifth of its time faulting it in again.
export MALLOC_MMAP_THRESHOLD_ = 4000000000
export MALLOC_TRIM_THRESHOLD_ = 8000000000

.PHONY: quickstart test test-fast test-stacks lint

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; set PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --upgrade pip
	.venv/bin/python -m pip install -q -e '.[test]'
	touch $@

# The TPU's compiler, for tests of what fits a chip. Not in the environment itself,
# where JAX would look for a TPU.
.venv/tested: .venv/installed
	test -z "$(TORCH)" || .venv/bin/python -m pip install -q $(TORCH)
	.venv/bin/python -m pip install -q --target .venv/libtpu --no-deps \
	  "$$(.venv/bin/python tests/libtpu_version.py)" \
	  || echo "no libtpu for this machine: tests of what fits a TPU are left out"
	touch $@

quickstart: .venv/installed
	.venv/bin/python -m gsae_jax.harvest --config=$(CONFIG) --store=$(QUICKSTART)/store
	.venv/bin/python -m gsae_jax.train --config=$(CONFIG) --store=$(QUICKSTART)/store --workdir=$(QUICKSTART)/run
	.venv/bin/python -m gsae_jax.evaluate --config=$(CONFIG) --workdir=$(QUICKSTART)/run
	@echo; echo "The report:"; .venv/bin/python -m gsae_jax.report --workdir=$(QUICKSTART)/run

test: .venv/tested
	$(PYTEST)

test-fast: .venv/tested
	$(PYTEST) -m 'not slow'

test-stacks:
	bash tests/stacks.sh

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
