# make quickstart   the whole line on the embedded model, from a fresh clone
# make test         every part once, from a fresh clone; under 10 minutes
# make test-fast    what one runs while working; under 2 minutes
# make test-all     every test but the campaigns
# make campaigns    kills, corruptions and random inputs, at full size
# make test-stacks  a quick part of the tests on the newest JAX and on Colab's
# make test-newest  the tests of `make test` on today's releases of everything
# make lint         style and types
# make constraints  chooses the exact versions in constraints/ anew
# make bench        an environment with what benchmarks compare with
#
# make clean-test-cache   deletes compiled programs that tests keep between runs

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; \
  do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo $$p && break; done)
VENV ?= .venv
QUICKSTART ?= quickstart
# What language models are checked against; `make test TORCH=` leaves that out.
TORCH ?= torch==2.13.0
CONFIG = experiments/quickstart.py
# Processes that share the tests; a file stays in one.
JOBS ?= 2
PYTEST = $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
# Where tests keep compiled programs between runs.
GSAE_TEST_CACHE ?= $(HOME)/.cache/gsae_jax/tests

# The exact versions that are installed; `make CONSTRAINTS= ...` takes the newest.
ifeq ($(origin CONSTRAINTS), undefined)
  CONSTRAINTS := $(shell $(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
    print({(3, 11): "constraints/py311.txt"}.get(v, "constraints/newest.txt") \
    if v <= (3, 14) else "")' 2>/dev/null)
endif
# The second option is for what builds the package.
PIN = $(if $(CONSTRAINTS),-c $(CONSTRAINTS) --build-constraint $(CONSTRAINTS))
INSTALL = $(VENV)/bin/python -m pip install -q $(PIN)

# Without these, glibc gives the memory of every large temporary back to the
# system, and a step on CPU spends a fifth of its time faulting it in again.
export MALLOC_MMAP_THRESHOLD_ = 4000000000
export MALLOC_TRIM_THRESHOLD_ = 8000000000

.PHONY: quickstart test test-fast test-rest test-all campaigns test-stacks \
  test-newest lint constraints bench clean-test-cache

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; set PYTHON=" >&2; exit 1; }
	@test -n "$(CONSTRAINTS)" || echo "no constraints file is used for $(PYTHON): the newest versions are installed"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	$(INSTALL) -e .
	touch $@

$(VENV)/linted: $(VENV)/installed
	$(INSTALL) -e '.[lint]'
	touch $@

# The TPU's compiler, for tests of what fits a chip. Not in the environment itself,
# where JAX would look for a TPU.
$(VENV)/tested: $(VENV)/installed
	$(INSTALL) -e '.[test]' $(TORCH)
	$(VENV)/bin/python -m pip install -q --target $(VENV)/libtpu --upgrade --no-deps \
	  "$$($(VENV)/bin/python tests/libtpu_version.py)" \
	  || echo "no libtpu for this machine: tests of what fits a TPU are left out"
	touch $@

quickstart: $(VENV)/installed
	$(VENV)/bin/python -m gsae_jax.harvest --config=$(CONFIG) --store=$(QUICKSTART)/store
	$(VENV)/bin/python -m gsae_jax.train --config=$(CONFIG) --store=$(QUICKSTART)/store --workdir=$(QUICKSTART)/run
	$(VENV)/bin/python -m gsae_jax.evaluate --config=$(CONFIG) --workdir=$(QUICKSTART)/run
	@echo; echo "The report:"; $(VENV)/bin/python -m gsae_jax.report --workdir=$(QUICKSTART)/run

test: $(VENV)/tested
	$(PYTEST) -m 'not slow and not campaign'

test-fast: $(VENV)/tested
	$(PYTEST) -m 'not integration and not slow and not campaign'

# What test-all runs beyond test.
test-rest: $(VENV)/tested
	$(PYTEST) -m 'slow and not campaign'

test-all: $(VENV)/tested
	$(PYTEST) -m 'not campaign'

# CAMPAIGNS='--campaign-share=0.2 --campaign-seed=1' draws a fifth of each.
campaigns: $(VENV)/tested
	$(PYTEST) -m campaign tests/campaigns $(CAMPAIGNS)

test-stacks:
	bash tests/stacks.sh

test-newest:
	bash tests/newest.sh $(CONSTRAINTS)

lint: $(VENV)/linted
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

constraints:
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install -q uv
	PATH=$(CURDIR)/.venv-constraints/bin:$$PATH python -m constraints.make pip setuptools $(TORCH)

bench: PIN = -c constraints/bench.txt --build-constraint constraints/bench.txt
bench: VENV = .venv-bench
bench:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip -c constraints/bench.txt
	$(INSTALL) -e '.[bench]'
	$(INSTALL) --no-deps dictionary-learning

clean-test-cache:
	rm -rf -- "$(GSAE_TEST_CACHE)"/????????????????
